"""Which sequences compute how many tokens in the next step, and where their KV goes.

A *sequence* is one answer being generated: prompt and answer tokens in one list, of which the first `num_computed` have
their keys and values in the sequence's blocks. Prefill, chunked prefill, decode and recomputation after a preemption
are all the same: some of the remaining tokens are computed, and when the last of them was, the next one is sampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from teco_kernels.decoder.kv_cache import KVCache


@dataclass(eq=False)
class Sequence:
    """One answer being generated.

    Attributes
    ----------
    token_ids : list of int
        The prompt, then the answer so far.
    max_tokens : int
        Longest answer.
    seed : int
        Key of its random numbers.
    blocks : list of int
        Its KV blocks, in order.
    num_computed : int
        Tokens whose keys and values are in the cache.
    num_indexed : int
        Leading blocks that are in the prefix index.
    num_cached : int
        Tokens that the prefix index had when the sequence was admitted.
    siblings : list of Sequence
        Other answers to the same prompt, that wait for it to be computed here.
    """

    token_ids: list[int]
    num_prompt: int
    max_tokens: int
    seed: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_indexed: int = 0
    num_cached: int = 0
    siblings: list[Sequence] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt


class Scheduler:
    """Continuous batching: sequences join and leave at every step.

    Running sequences come first, in order of arrival, then waiting ones, until the step's tokens or the blocks are used
    up. When a running sequence finds no block, the one that arrived last gives up all of its own and waits to be
    recomputed; the first one therefore always gets on.

    Parameters
    ----------
    cache : KVCache
    max_num_seqs : int
        Most sequences running at a time.
    max_num_batched_tokens : int
        Most tokens per step; longer prompts are computed in chunks.

    Attributes
    ----------
    enable_prefix_caching : bool
        Whether a prompt takes blocks from the prefix index; False computes all of its tokens.
    """

    def __init__(self, cache: KVCache, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cache = cache
        self.pool = cache.pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.enable_prefix_caching = True
        self.num_preemptions = 0
        # Of sequences that were admitted; the pool's own counters include those that then found no room.
        self.num_queried_tokens = self.num_cached_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next step, each with the number of its tokens to compute; their blocks are reserved."""
        budget = self.max_num_batched_tokens
        batch: list[tuple[Sequence, int]] = []
        preempted = self.num_preemptions
        # Victims are taken from the end, so whoever has been given a place in the batch keeps it.
        position = 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            # A step that failed between computing and sampling has left it without its next token: once more, then.
            sequence.num_computed = min(sequence.num_computed, len(sequence.token_ids) - 1)
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed, budget)
            while not self._reserve(sequence, num_tokens):
                self._preempt(self.running.pop())
                if position == len(self.running):  # it was the sequence itself
                    break
            else:
                batch.append((sequence, num_tokens))
                budget -= num_tokens
                position += 1
        if self.num_preemptions == preempted:
            self._admit(batch, budget)
        return batch

    def _admit(self, batch: list[tuple[Sequence, int]], budget: int) -> None:
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            if self._num_running() + 1 + len(sequence.siblings) > self.max_num_seqs:
                break
            sequence.blocks = self.pool.find_prefix(sequence.token_ids[:-1]) if self.enable_prefix_caching else []
            # Room for all of its tokens, not just for the first chunk: else it would soon be thrown out again.
            if self._num_blocks(len(sequence.token_ids)) - len(sequence.blocks) > self.pool.num_available:
                self._release(sequence)
                break
            sequence.num_computed = sequence.num_cached = len(sequence.blocks) * self.pool.block_size
            sequence.num_indexed = len(sequence.blocks)
            self.num_queried_tokens += len(sequence.token_ids)
            self.num_cached_tokens += sequence.num_cached
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed, budget)
            self._reserve(sequence, num_tokens)
            self.running.append(self.waiting.popleft())
            batch.append((sequence, num_tokens))
            budget -= num_tokens

    def _num_running(self) -> int:
        return len(self.running) + sum(len(sequence.siblings) for sequence in self.running)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks of its own to write its next tokens into; False when there are not enough."""
        # A step that failed may have left blocks behind that it had reserved for guesses.
        missing = max(self._num_blocks(sequence.num_computed + num_tokens) - len(sequence.blocks), 0)
        first = sequence.num_computed // self.pool.block_size
        copy = first < len(sequence.blocks) and self.pool.is_shared(sequence.blocks[first])
        fresh = self.pool.allocate(missing + copy)
        if fresh is None:
            return False
        if copy:
            source, target = sequence.blocks[first], fresh.pop()
            self.cache.copy_block(source, target)
            self.pool.free([source])
            sequence.blocks[first] = target
        sequence.blocks += fresh
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Reserve room for tokens after those that the next step computes; False, and none, when there is not enough.

        Unlike what a step needs, this preempts nobody. `trim` gives back what was not used.
        """
        missing = self._num_blocks(len(sequence.token_ids) + num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        sequence.blocks += fresh
        return True

    def trim(self, sequence: Sequence) -> None:
        """Free the blocks that `extend` reserved and that hold no token of the sequence."""
        used = self._num_blocks(sequence.num_computed)
        self.pool.free(sequence.blocks[used:])
        del sequence.blocks[used:]

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.num_computed, sequence.num_indexed = [], 0, 0

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that the step has computed `num_tokens` more tokens; full blocks enter the prefix index."""
        sequence.num_computed += num_tokens
        start, end = sequence.num_indexed, sequence.num_computed // self.pool.block_size
        if end > start:
            tokens = sequence.token_ids[start * self.pool.block_size : end * self.pool.block_size]
            parent = sequence.blocks[start - 1] if start else None
            sequence.blocks[start:end] = self.pool.cache_blocks(sequence.blocks[start:end], tokens, parent=parent)
            sequence.num_indexed = end

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """Start the siblings of a sequence whose prompt is computed: they share its blocks, until they write to one."""
        siblings, sequence.siblings = sequence.siblings, []
        position = self.running.index(sequence) + 1
        for sibling in siblings:
            self.pool.ref(sequence.blocks)
            sibling.blocks = list(sequence.blocks)
            sibling.num_computed, sibling.num_indexed = sequence.num_computed, sequence.num_indexed
        self.running[position:position] = siblings
        return siblings

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget finished or aborted sequences and free their blocks."""
        for sequence in sequences:
            if sequence in self.running:
                self.running.remove(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)
            self._release(sequence)
