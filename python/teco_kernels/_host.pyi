"""Host-side classes of the decoder loop and of the communicator (compiled from csrc/host; torch-free)."""

from collections.abc import Sequence

class BlockPool:
    """Hands out the blocks of a KV cache and finds the ones that already hold a prefix.

    A block is *used* (somebody holds a reference), *cached* (nobody does, but the prefix index knows its tokens: kept
    until its room is needed, least recently used first) or *free*; ``num_used + num_cached + num_free == num_blocks``
    at all times. Every call costs O(1) per block it is given or returns. Not thread-safe.

    Wrong ids, double frees and the like raise ValueError and leave the pool as it was.

    Parameters
    ----------
    num_blocks : int
        Blocks in the cache; their ids are 0 to ``num_blocks - 1``.
    block_size : int
        Tokens per block.
    hash_bits : int
        Bits of the prefix hash that are used. Fewer than 64 make collisions, which cost time and nothing else, as
        tokens are always compared; meant for tests.

    Examples
    --------
    The life of a sequence::

        blocks = pool.find_prefix(prompt[:-1])              # the last token must be computed, for its logits
        fresh = pool.allocate(num_needed - len(blocks))     # None: wait, or preempt somebody, after pool.free(blocks)
        ...                                                 # the step writes KV; blocks [a, b) are full now
        blocks[a:b] = pool.cache_blocks(
            blocks[a:b], tokens[a * B : b * B], parent=blocks[a - 1] if a else None
        )
        pool.free(blocks)                                   # finished or preempted; full blocks stay cached

    References
    ----------
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv 2309.06180.
    """

    def __init__(self, num_blocks: int, block_size: int, *, hash_bits: int = 64) -> None: ...
    def allocate(self, n: int = 1) -> list[int] | None:
        """Take `n` blocks, each with one reference; cached blocks are evicted when the free ones do not suffice.

        Returns
        -------
        list of int, or None
            None, and nothing is taken or evicted, when ``n > num_available``.
        """

    def ref(self, block_ids: Sequence[int]) -> None:
        """Add a reference to each block, as a fork of a sequence does. All must be used."""

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop a reference to each block; those that nobody holds any longer become cached or free.

        Give the blocks of a sequence in their order: the end of a prefix then leaves the cache before its beginning.
        """

    def find_prefix(self, token_ids: Sequence[int], *, salt: int = 0) -> list[int]:
        """Find the blocks of the longest indexed prefix of `token_ids`, and take a reference to each.

        Parameters
        ----------
        token_ids : sequence of int
            Only whole blocks of tokens match.
        salt : int
            0 to 2**64 - 1. Prefixes that were entered under another salt (another adapter, another tenant) never match.

        Returns
        -------
        list of int
            Block ids in order; empty when not even the first block is known.
        """

    def cache_blocks(
        self, block_ids: Sequence[int], token_ids: Sequence[int], *, parent: int | None = None, salt: int = 0
    ) -> list[int]:
        """Enter full blocks into the prefix index, once their KV is written.

        Parameters
        ----------
        block_ids : sequence of int
            Consecutive blocks of one sequence, all used.
        token_ids : sequence of int
            Exactly their tokens: ``len(block_ids) * block_size`` of them.
        parent : int, optional
            The block before them, also used; None when they begin the sequence. If the index no longer knows it (see
            `clear_prefix_cache`), nothing is entered.
        salt : int
            As in `find_prefix`; read only when `parent` is None.

        Returns
        -------
        list of int
            The blocks to use from now on. Where another block already held the same prefix it takes the place of the
            given one, whose reference is dropped; elsewhere they are the given ones.
        """

    def clear_prefix_cache(self) -> None:
        """Forget all prefixes: cached blocks become free, used blocks stay used."""

    def ref_count(self, block_id: int) -> int:
        """References to the block; 0 for cached and free ones."""

    def is_shared(self, block_id: int) -> bool:
        """Whether a write would be seen by another holder or by the prefix index: copy the block first."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but that keep a known prefix."""

    @property
    def num_available(self) -> int:
        """What `allocate` can hand out: free and cached blocks."""

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds; a shared block counts once."""

    @property
    def peak_used(self) -> int:
        """Largest `num_used` so far."""

    @property
    def num_evictions(self) -> int:
        """Cached blocks that were given up for their room."""

    @property
    def queried_tokens(self) -> int:
        """Tokens that `find_prefix` was asked for."""

    @property
    def hit_tokens(self) -> int:
        """Tokens that `find_prefix` found."""

MAX_RANKS: int
"""Ranks that a `Communicator` can have."""

class CommunicatorError(RuntimeError):
    """A collective did not take place: a rank has ended, called something else, or did not come in time.

    The communicator is of no further use, on every rank: each gets this error from the call that it is in, or from its
    next one. The message names the rank that caused it.
    """

def take_raised() -> BaseException | None:
    """Take what a signal's handler raised while a collective waited, which has then failed."""

class Segment:
    """Memory without a name that the ranks of a communicator share: gone with the last process that has mapped it."""

    @staticmethod
    def create(world_size: int, registered_bytes: int = 0) -> Segment:
        """Take new memory, of mode 0600, `registered_bytes` of it for each rank to write itself.

        RuntimeError when there is none of this kind.
        """

    @staticmethod
    def open(pid: int, descriptor: int, token: int, world_size: int, registered_bytes: int = 0) -> Segment:
        """Map that of another process by its descriptor there. RuntimeError when it cannot be, or is not the one."""

    @property
    def descriptor(self) -> int:
        """To open it by; -1 once it is closed."""

    @property
    def token(self) -> int:
        """A random number by which the segment is known."""

class Communicator:
    """The native side of `teco_kernels.Communicator`, whose collectives are operators that know it by its number.

    Parameters
    ----------
    segment : Segment
        Belongs to the communicator from now on.
    rank : int
        Of this process.
    pids : list of int
        Of all ranks, in their order. RuntimeError when one of them cannot be watched.
    timeout : float
        Seconds.
    """

    def __init__(self, segment: Segment, rank: int, pids: Sequence[int], timeout: float) -> None: ...
    @property
    def number(self) -> int:
        """Of this communicator in this process."""

    @property
    def registered(self) -> int:
        """Address of this rank's registered memory, valid for as long as the object lives."""

    def close_descriptor(self) -> None:
        """Let nobody open the segment any more."""

    def close(self) -> None:
        """End the communicator for all ranks."""

    @property
    def ended(self) -> bool:
        """Whether a rank has closed it or a call has failed."""

    @staticmethod
    def one_shot_bytes(world_size: int) -> int:
        """Largest tensor that every rank adds up for itself."""

class DeviceCommunicator:
    """Collectives of ranks that are processes of one host, each with a GPU.

    Parameters
    ----------
    device : int
        Number of the GPU in this process.
    rank, world_size : int
    timeout : float
        Seconds that a kernel waits for those of other ranks.
    registered_bytes : int
        The same on all ranks, as all below.
    slot_bytes : int
        What a block hands over in a step, a multiple of 16.
    one_shot_bytes : int
        Largest tensor that every rank adds up for itself; -1: `one_shot_bytes(world_size)`.
    max_blocks : int
        Of a launch.

    Raises
    ------
    RuntimeError
        There is no memory, or the build has no CUDA kernels.
    """

    def __init__(
        self,
        device: int,
        rank: int,
        world_size: int,
        timeout: float,
        registered_bytes: int = 0,
        *,
        slot_bytes: int = ...,
        one_shot_bytes: int = -1,
        max_blocks: int = ...,
    ) -> None: ...
    @property
    def handle(self) -> bytes:
        """What other processes find this rank's memory by."""

    def connect(self, handles: Sequence[bytes]) -> None:
        """Map the memory of all ranks, whose handles come in their order. RuntimeError where a GPU cannot see it."""

    @property
    def number(self) -> int:
        """Of this communicator in this process."""

    @property
    def registered(self) -> int:
        """Address, on the GPU, of this rank's registered memory, valid for as long as the object lives."""

    def close(self) -> None:
        """Take part no more."""

    @property
    def ended(self) -> bool:
        """Whether it was closed here, or ranks have given up."""

    @staticmethod
    def one_shot_bytes(world_size: int) -> int:
        """Largest tensor that every rank adds up for itself, by default."""

class DriverKernel:
    """A kernel that was compiled ahead of time, launched through the driver of the GPU.

    The driver's library is opened when the first kernel of it is loaded, and never linked.

    Parameters
    ----------
    library : str
        The driver's library, such as ``libcuda.so.1``.
    is_hip : bool
        Whether its functions are HIP's.
    image : bytes
        A cubin or hsaco; loaded into the current context, for as long as the process lives.
    name : str
        Of the kernel in the image.
    parameters : str
        A character per parameter: "p" a pointer, "i" and "l" integers of 32 and 64 bits, "f" fp32. Two pointers to
        scratch memory, which Triton's kernels take behind them, are not counted, and null.
    block_threads, shared_bytes : int
        Threads of a program, and its shared memory.
    device : int
        Whose context a thread gets that has none yet, here or at a launch. Of one that has, it is the caller's to see
        that it is this device's.

    Raises
    ------
    RuntimeError
        When the library, a function of it or the kernel is missing, or the driver reports an error.
    """

    def __init__(
        self,
        library: str,
        is_hip: bool,
        image: bytes,
        name: str,
        parameters: str,
        block_threads: int,
        shared_bytes: int,
        device: int,
    ) -> None: ...
    def launch(self, grid: tuple[int, int, int], stream: int, arguments: Sequence[int | float]) -> None:
        """Enqueue the kernel. ValueError when arguments do not fit the parameters; RuntimeError by the driver."""
