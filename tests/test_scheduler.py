"""The scheduler on its own: order, budget, blocks; with a model that is only pretended."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from teco_kernels._host import BlockPool
from teco_kernels.decoder.scheduler import Scheduler, Sequence


class Cache:
    """Remembers which token was written into which slot, as the real one does with keys and values."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def copy_block(self, source: int, target: int) -> None:
        for offset in range(self.pool.block_size):
            self.slots[target, offset] = self.slots.get((source, offset), ())


class Loop:
    """Steps a scheduler; a token's "keys and values" are the whole text up to it, and must be found again."""

    def __init__(self, num_blocks: int, block_size: int = 4, *, max_num_seqs: int = 8, budget: int = 16) -> None:
        self.cache = Cache(num_blocks, block_size)
        self.budget = budget
        self.scheduler = Scheduler(
            self.cache,  # type: ignore[arg-type]
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
        )
        self.finished: list[Sequence] = []

    def add(self, prompt: list[int], max_tokens: int, num_siblings: int = 0) -> Sequence:
        first, *siblings = (Sequence(list(prompt), len(prompt), max_tokens, i) for i in range(num_siblings + 1))
        first.siblings = siblings
        self.scheduler.add(first)
        return first

    def step(self) -> list[tuple[Sequence, int]]:
        scheduler, cache = self.scheduler, self.cache
        running, num_preemptions = list(scheduler.running), scheduler.num_preemptions
        batch = scheduler.schedule()
        if scheduler.num_preemptions > num_preemptions:  # else the blocks just given up would be taken back at once
            assert all(sequence in running for sequence, _ in batch)
        assert sum(num_tokens for _, num_tokens in batch) <= self.budget
        assert scheduler._num_running() <= scheduler.max_num_seqs
        written: set[tuple[int, int]] = set()
        for sequence, num_tokens in batch:
            assert num_tokens > 0
            for position in range(sequence.num_computed, sequence.num_computed + num_tokens):
                slot = self._slot(sequence, position)
                assert slot not in written
                assert not cache.pool.is_shared(slot[0])
                written.add(slot)
                cache.slots[slot] = tuple(sequence.token_ids[: position + 1])
        complete = []
        for sequence, num_tokens in batch:
            scheduler.commit(sequence, num_tokens)
            for position in range(sequence.num_computed):
                assert cache.slots[self._slot(sequence, position)] == tuple(sequence.token_ids[: position + 1])
            if sequence.num_computed == len(sequence.token_ids):
                complete.append(sequence)
        for sequence in complete:
            for member in [sequence, *scheduler.fork(sequence)]:
                member.token_ids.append(hash((member.seed, len(member.token_ids))) % 3)
                if member.num_generated == member.max_tokens:
                    scheduler.remove([member])
                    self.finished.append(member)
        return batch

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.cache.pool.block_size)
        return sequence.blocks[block], offset

    def run(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.step(), "nothing to compute though somebody waits"
        assert self.cache.pool.num_used == 0


def sizes(batch: list[tuple[Sequence, int]]) -> list[int]:
    return [num_tokens for _, num_tokens in batch]


def test_sequences_join_at_every_step_and_prompts_are_cut_to_the_budget() -> None:
    loop = Loop(num_blocks=32)
    loop.add([0] * 10, 5)
    loop.add([1] * 10, 5)
    assert sizes(loop.step()) == [10, 6]
    loop.add([2] * 3, 5)
    assert sizes(loop.step()) == [1, 4, 3]
    assert sizes(loop.step()) == [1, 1, 1]
    loop.run()
    assert [sequence.token_ids[0] for sequence in loop.finished] == [0, 1, 2]


def test_as_many_run_as_may() -> None:
    loop = Loop(num_blocks=32, max_num_seqs=3)
    loop.add([0, 0], 4)
    loop.add([1, 1], 4, num_siblings=2)  # three answers: not beside another one
    loop.add([2, 2], 4)  # would fit, but nobody overtakes
    assert len(loop.step()) == 1
    loop.run()
    assert [sequence.token_ids[0] for sequence in loop.finished] == [0, 1, 1, 1, 2]


def test_the_last_to_come_gives_up_its_blocks_and_is_the_first_to_come_back() -> None:
    loop = Loop(num_blocks=5)
    sequences = [loop.add([index] * 4, 8) for index in range(3)]
    while not loop.scheduler.num_preemptions:
        loop.step()
    assert sequences[0] in loop.scheduler.running
    assert list(loop.scheduler.waiting)[:1] == [sequences[len(loop.scheduler.running)]]
    assert all(not sequence.blocks and sequence.num_computed == 0 for sequence in loop.scheduler.waiting)
    loop.run()
    assert [sequence.token_ids[0] for sequence in loop.finished] == [0, 1, 2]


def test_nobody_is_admitted_without_room_for_all_of_its_prompt() -> None:
    loop = Loop(num_blocks=6)
    loop.add([0] * 12, 2)
    loop.add([1] * 16, 2)
    assert sizes(loop.step()) == [12]
    assert len(loop.scheduler.waiting) == 1
    assert loop.cache.pool.num_used == 3
    loop.run()


def test_a_known_prefix_is_not_computed_again() -> None:
    loop = Loop(num_blocks=32)
    loop.add(list(range(10)), 3)
    loop.run()
    again = loop.add([*range(9), 99, 98], 3)
    assert sizes(loop.step()) == [3]
    assert again.num_cached == 8
    assert (loop.scheduler.num_queried_tokens, loop.scheduler.num_cached_tokens) == (21, 8)
    loop.run()
    # Of a prompt that is known in full the last token is still computed: its logits are needed.
    loop.add(list(range(8)), 3)
    assert sizes(loop.step()) == [4]
    loop.run()


def test_waiting_does_not_count_as_asking_the_prefix_index() -> None:
    loop = Loop(num_blocks=4)
    loop.add([0] * 8, 8)
    loop.add([1] * 12, 4)
    for _ in range(5):
        loop.step()
    assert loop.scheduler.num_queried_tokens == 8
    loop.run()


def test_two_that_compute_the_same_prompt_at_once_share_it_afterwards() -> None:
    loop = Loop(num_blocks=32)
    one, two = loop.add([7] * 8, 4), loop.add([7] * 8, 4)
    loop.step()
    assert one.blocks[:2] == two.blocks[:2]
    assert loop.cache.pool.num_used == 2
    loop.run()


def test_siblings_share_blocks_until_they_write() -> None:
    loop = Loop(num_blocks=32)
    first = loop.add([5] * 6, 4, num_siblings=2)
    loop.step()
    members = loop.scheduler.running
    assert [member.seed for member in members] == [0, 1, 2]
    assert members[0] is first
    assert loop.cache.pool.num_used == 2
    loop.step()  # all three write into the half-filled block: two copies, and the last holder keeps it
    assert len({member.blocks[0] for member in members}) == 1
    assert len({member.blocks[1] for member in members}) == 3
    assert loop.cache.pool.num_used == 4
    loop.run()


def test_remove_frees_whatever_the_state() -> None:
    loop = Loop(num_blocks=5)
    sequences = [loop.add([index] * 6, 6) for index in range(3)]
    loop.step()
    loop.scheduler.remove(sequences)
    assert not loop.scheduler.running
    assert not loop.scheduler.waiting
    assert loop.cache.pool.num_used == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_order_of_events_ends_with_all_finished_and_no_block_held(data: Any) -> None:
    """Requests with common prefixes and siblings, in a cache that holds little more than the longest one."""
    block_size = data.draw(st.integers(1, 5))
    loop = Loop(
        num_blocks=-(-24 // block_size) + data.draw(st.integers(0, 12)),
        block_size=block_size,
        max_num_seqs=data.draw(st.integers(3, 8)),
        budget=data.draw(st.integers(1, 20)),
    )
    expected = 0
    for _ in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=15))
        num_siblings = data.draw(st.integers(0, 2))
        loop.add(prompt, data.draw(st.integers(1, 10)), num_siblings)
        expected += 1 + num_siblings
        for _ in range(data.draw(st.integers(0, 4))):
            loop.step()
    loop.run()
    assert len(loop.finished) == expected
    assert all(sequence.num_generated == sequence.max_tokens for sequence in loop.finished)
