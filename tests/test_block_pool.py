"""The block pool: references, copy-on-write, the prefix index and its eviction, against a model made of dicts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from teco_kernels._host import BlockPool

BLOCK = 2


def test_allocates_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(3)
    assert blocks is not None
    assert sorted(blocks) == sorted(set(blocks))
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_used, pool.num_cached) == (1, 3, 0)
    assert pool.allocate(0) == []
    pool.free(blocks)
    assert (pool.num_free, pool.peak_used) == (4, 3)


def test_fork_shares_until_the_other_holder_lets_go() -> None:
    pool = BlockPool(4, BLOCK)
    blocks = pool.allocate(2)
    assert blocks is not None
    assert not pool.is_shared(blocks[1])
    pool.ref(blocks)
    assert pool.is_shared(blocks[1])
    assert pool.ref_count(blocks[1]) == 2
    pool.free(blocks)
    assert not pool.is_shared(blocks[1])
    assert pool.num_used == 2


def test_an_indexed_block_must_not_be_written() -> None:
    pool = BlockPool(4, BLOCK)
    [block] = pool.allocate(1)
    pool.cache_blocks([block], [1, 2])
    assert pool.ref_count(block) == 1
    assert pool.is_shared(block)


def test_finds_the_longest_prefix_of_whole_blocks() -> None:
    pool = BlockPool(8, BLOCK)
    blocks = pool.allocate(3)
    assert pool.cache_blocks(blocks, [1, 2, 3, 4, 5, 6]) == blocks
    pool.free(blocks)
    assert pool.num_cached == 3
    assert pool.find_prefix([1, 2, 3, 4, 5]) == blocks[:2]
    assert (pool.num_used, pool.num_cached) == (2, 1)
    assert pool.find_prefix([1, 2, 9, 9]) == blocks[:1]
    assert pool.find_prefix([3, 4]) == []  # a block is known by all that came before it
    assert pool.find_prefix([1, 2], salt=7) == []
    assert (pool.queried_tokens, pool.hit_tokens) == (5 + 4 + 2 + 2, 4 + 2)


def test_prefixes_grow_block_by_block() -> None:
    pool = BlockPool(8, BLOCK)
    blocks = pool.allocate(2)
    pool.cache_blocks(blocks[:1], [1, 2], salt=5)
    pool.cache_blocks(blocks[1:], [3, 4], parent=blocks[0])
    assert pool.find_prefix([1, 2, 3, 4], salt=5) == blocks


def test_equal_prefixes_end_up_in_one_block() -> None:
    pool = BlockPool(8, BLOCK)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.cache_blocks(first, [1, 2, 3, 4])
    assert pool.cache_blocks(second, [1, 2, 5, 6]) == [first[0], second[1]]
    assert pool.ref_count(first[0]) == 2
    assert pool.ref_count(second[0]) == 0
    assert pool.num_used == 3
    assert pool.find_prefix([1, 2, 5, 6]) == [first[0], second[1]]


def test_evicts_the_oldest_chain_from_its_end() -> None:
    pool = BlockPool(4, BLOCK)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.cache_blocks(old, [1, 2, 3, 4])
    pool.cache_blocks(new, [5, 6, 7, 8])
    pool.free(old)
    pool.free(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.find_prefix([1, 2, 3, 4]) == [old[0]]
    assert pool.allocate(1) == [new[1]]
    assert pool.num_evictions == 2
    assert pool.find_prefix([5, 6, 7, 8]) == [new[0]]


def test_use_protects_from_eviction() -> None:
    pool = BlockPool(3, BLOCK)
    blocks = pool.allocate(3)
    pool.cache_blocks(blocks[:1], [1, 2])
    pool.cache_blocks(blocks[1:2], [3, 4])
    pool.free(blocks)
    pool.free(pool.find_prefix([1, 2]))  # used last, so evicted last
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert pool.find_prefix([1, 2]) == [blocks[0]]


def test_clearing_the_index_keeps_what_is_used() -> None:
    pool = BlockPool(4, BLOCK)
    blocks = pool.allocate(2)
    pool.cache_blocks(blocks, [1, 2, 3, 4])
    pool.free(blocks[1:])
    pool.clear_prefix_cache()
    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 3)
    [later] = pool.allocate(1)
    assert pool.cache_blocks([later], [3, 4], parent=blocks[0]) == [later]  # its parent is forgotten: not entered
    assert not pool.is_shared(later)
    assert pool.find_prefix([1, 2, 3, 4]) == []


def test_mistakes_are_refused_and_change_nothing() -> None:
    pool = BlockPool(4, BLOCK)
    blocks = pool.allocate(2)
    pool.cache_blocks(blocks[:1], [1, 2])
    for call, message in [
        (lambda: pool.free([blocks[0], blocks[1], blocks[0]]), "block_ids: block .* freed more often than it is held"),
        (lambda: pool.free([blocks[0], 4]), "block_ids: expected 0 to 3, got 4"),
        (lambda: pool.ref([blocks[0], 3]), "block_ids: block 3 is not in use"),
        (lambda: pool.ref_count(-1), "block_id: expected 0 to 3, got -1"),
        (lambda: pool.allocate(-1), "n: expected a number of blocks >= 0, got -1"),
        (lambda: pool.cache_blocks(blocks, [1, 2, 3]), "token_ids: expected 2 blocks of 2 tokens, got 3 tokens"),
        (lambda: pool.cache_blocks(blocks[:1], [1, 9]), "block_ids: block 0 already holds other tokens"),
        (lambda: pool.cache_blocks([blocks[1]] * 2, [3, 4] * 2), "block_ids: a block stands there twice"),
        (lambda: pool.cache_blocks(blocks[1:], [3, 4], parent=2), "parent: block 2 is not in use"),
        (lambda: BlockPool(4, 0), "block_size: expected 1 to"),
        (lambda: BlockPool(-1, 4), "num_blocks: expected 0 to"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        assert (pool.num_used, pool.num_cached, pool.num_free) == (2, 0, 2)
        assert [pool.ref_count(block) for block in blocks] == [1, 1]
    assert pool.find_prefix([1, 2]) == blocks[:1]


@dataclass
class Node:
    """An entry of the model's prefix tree; dropping it from its parent's children drops all below it."""

    block: int
    siblings: dict[tuple[int, ...], Node]
    key: tuple[int, ...]
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]
    salt: int
    num_indexed: int  # leading blocks that went through cache_blocks


class BlockPoolMachine(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet, so that prefixes meet, in a pool too small for them."""

    sequences = Bundle("sequences")

    @initialize(num_blocks=st.integers(0, 9), hash_bits=st.sampled_from([0, 1, 64]))
    def start(self, num_blocks: int, hash_bits: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, hash_bits=hash_bits)
        self.roots: dict[int, dict[tuple[int, ...], Node]] = {0: {}, 1: {}}
        self.nodes: dict[int, Node] = {}  # of indexed blocks
        self.refs = dict.fromkeys(range(num_blocks), 0)
        self.cached: dict[int, None] = {}  # oldest first
        self.free = set(range(num_blocks))

    def lookup(self, tokens: list[int], salt: int) -> list[int]:
        found, level = [], self.roots[salt]
        for i in range(0, len(tokens) - BLOCK + 1, BLOCK):
            node = level.get(tuple(tokens[i : i + BLOCK]))
            if node is None:
                break
            found.append(node.block)
            level = node.children
        return found

    def take(self, block: int) -> None:
        self.refs[block] += 1
        self.cached.pop(block, None)

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if block in self.nodes:
                self.cached[block] = None
            else:
                self.free.add(block)

    def release_all(self, blocks: list[int]) -> None:
        self.pool.free(blocks)
        for block in reversed(blocks):
            self.release(block)

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), salt=st.integers(0, 1))
    def begin(self, tokens: list[int], salt: int):
        prefix = self.pool.find_prefix(tokens, salt=salt)
        assert prefix == self.lookup(tokens, salt)
        for block in prefix:
            self.take(block)
        wanted = -(-len(tokens) // BLOCK) - len(prefix)
        fresh = self.pool.allocate(wanted)
        if wanted > len(self.free) + len(self.cached):
            assert fresh is None
            self.release_all(prefix)
            return multiple()
        assert fresh is not None
        evicted = list(self.cached)[: max(0, wanted - len(self.free))]
        assert set(evicted) == set(fresh) & set(self.cached)
        assert set(fresh) <= self.free | set(evicted)
        assert len(set(fresh)) == wanted
        for block in evicted:
            node = self.nodes.pop(block)
            if node.siblings.get(node.key) is node:
                del node.siblings[node.key]
        self.free -= set(fresh)
        for block in fresh:
            self.take(block)
        return Sequence(tokens, prefix + fresh, salt, len(prefix))

    @rule(sequence=sequences)
    def index(self, sequence: Sequence) -> None:
        begin, end = sequence.num_indexed, len(sequence.tokens) // BLOCK
        parent = sequence.blocks[begin - 1] if begin else None
        got = self.pool.cache_blocks(
            sequence.blocks[begin:end],
            sequence.tokens[begin * BLOCK : end * BLOCK],
            parent=parent,
            salt=sequence.salt,
        )
        sequence.num_indexed = end
        if parent is not None and parent not in self.nodes:
            assert got == sequence.blocks[begin:end]
            return
        level = self.roots[sequence.salt] if parent is None else self.nodes[parent].children
        for i in range(begin, end):
            block, key = sequence.blocks[i], tuple(sequence.tokens[i * BLOCK : (i + 1) * BLOCK])
            if key in level:
                self.take(level[key].block)
                self.release(block)
            else:
                level[key] = self.nodes[block] = Node(block, level, key)
            sequence.blocks[i] = level[key].block
            level = level[key].children
        assert got == sequence.blocks[begin:end]

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        self.pool.ref(sequence.blocks)
        for block in sequence.blocks:
            self.take(block)
        # The fork never indexes: its twin does, and may exchange its own blocks for canonical ones.
        return Sequence(sequence.tokens, list(sequence.blocks), sequence.salt, len(sequence.tokens) // BLOCK)

    @rule(sequence=consumes(sequences))
    def finish(self, sequence: Sequence) -> None:
        self.release_all(sequence.blocks)

    @rule()
    def clear(self) -> None:
        self.pool.clear_prefix_cache()
        self.free |= set(self.cached)
        self.cached, self.nodes, self.roots = {}, {}, {0: {}, 1: {}}

    @rule(sequence=sequences)
    def free_too_often(self, sequence: Sequence) -> None:
        block = sequence.blocks[0]
        with pytest.raises(ValueError, match="freed more often than it is held"):
            self.pool.free(sequence.blocks + [block] * self.refs[block])

    @invariant()
    def counts_agree(self) -> None:
        pool = self.pool
        assert [pool.ref_count(block) for block in self.refs] == list(self.refs.values())
        assert [pool.is_shared(block) for block in self.refs] == [
            refs > 1 or block in self.nodes for block, refs in self.refs.items()
        ]
        assert (pool.num_free, pool.num_cached) == (len(self.free), len(self.cached))
        assert pool.num_used == sum(refs > 0 for refs in self.refs.values())
        assert pool.num_used + pool.num_cached + pool.num_free == pool.num_blocks
        assert pool.peak_used >= pool.num_used


TestBlockPoolAgainstModel = BlockPoolMachine.TestCase
TestBlockPoolAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
