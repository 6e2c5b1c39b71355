"""The plan of a step's memory: what lives at the same time never shares it."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from teco_kernels.decoder.arena import ArenaPlan, Intermediate
from teco_kernels.decoder.layers import Buffers, arena_plan, shared_plan


class Shape:
    hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, rms_norm_eps = 576, 1536, 9, 3, 64, 1e-5


@st.composite
def intermediates(draw: st.DrawFn) -> list[Intermediate]:
    items = []
    for index in range(draw(st.integers(0, 8))):
        first = draw(st.integers(0, 9))
        items.append(Intermediate(str(index), draw(st.integers(1, 100)), first, draw(st.integers(first, 10))))
    return items


@given(intermediates())
def test_no_two_that_live_together_overlap(items: list[Intermediate]) -> None:
    plan = ArenaPlan.make(items, torch.float32)
    placed = list(zip(plan.intermediates, plan.offsets, plan.sizes, strict=True))
    for (one, begin, size), (other, other_begin, other_size) in combinations(placed, 2):
        if one.overlaps(other):
            assert begin + size <= other_begin or other_begin + other_size <= begin
    assert all(offset % 64 == 0 for offset in plan.offsets)
    assert plan.bytes_per_token <= plan.bytes_per_token_apart
    views = plan.place(torch.zeros(3 * plan.bytes_per_token, dtype=torch.uint8), 3, torch.float32)
    for item, *_ in placed:
        assert views[item.name].shape == (3, item.columns)


def test_the_plan_of_a_layer() -> None:
    plan = arena_plan(Shape(), torch.float32)
    # Both matrices between the MLP's operations, and what lives throughout; those of attention lie where they do.
    assert plan.bytes_per_token == 4 * (3 * 1536 + 2 * 576)
    assert plan.bytes_per_token_apart == 4 * (3 * 1536 + 2 * 576 + 15 * 64 + 9 * 64)
    assert "gate_up                      12288" in str(plan)
    assert "23040   (apart: 29184)" in str(plan)


def test_buffers_share_memory_as_planned() -> None:
    buffers = Buffers.allocate(Shape(), 5, torch.float32)
    assert buffers.attention_sum is buffers.hidden
    assert buffers.rows(2).gate_up.shape == (2, 3072)
    shared = torch.zeros(5 * shared_plan(Shape()).bytes_per_token, dtype=torch.uint8)
    buffers = Buffers.allocate(Shape(), 5, torch.float32, shared)
    begin, end = shared.data_ptr(), shared.data_ptr() + shared.nbytes
    for name, tensor in buffers._asdict().items():
        assert (begin <= tensor.data_ptr() < end) == name.endswith("_sum")
    assert buffers.attention_sum.data_ptr() + buffers.attention_sum.nbytes <= buffers.mlp_sum.data_ptr()
