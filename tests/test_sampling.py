"""The sampler: right distribution, right support, the same token in any company, and clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import teco_kernels as tk
from teco_kernels.ops.sampling import philox_bits, sample_reference, sample_weights_reference
from teco_kernels.testing import TOLERANCE
from teco_kernels.testing.cases.sampling import DEFAULTS, FILTERS

DRAWS = 20000


def tensors(rows: int, **asked: float) -> dict[str, torch.Tensor]:
    """Filter parameters, the same for every row."""
    values = DEFAULTS | asked
    return {
        name: torch.full((rows,), values[name], dtype=torch.int64 if name == "top_k" else torch.float32)
        for name in DEFAULTS
    }


def test_philox_known_answers() -> None:
    # The vector for counter 0 and key 0 that Random123 publishes; the kernel is held against this function below.
    assert philox_bits(0, 0) == 0xE169C58D_6627E8D5
    assert philox_bits(1, 0) != philox_bits(0, 1) != philox_bits(1 << 32, 0) != philox_bits(0, 1 << 32)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vary", ["seed", "offset"])
def test_draws_follow_the_reference_distribution(filters: str, vary: str) -> None:
    row = 2 * torch.randn(1, 150, generator=torch.Generator().manual_seed(3))
    logits = row.expand(DRAWS, -1)
    counter = {"seed": 1234, "offset": 99} | {vary: torch.arange(DRAWS)}
    tokens = tk.sample(logits, **tensors(DRAWS, **FILTERS[filters]), **counter)

    weights = sample_weights_reference(row, **tensors(1, **FILTERS[filters]))[0]
    expected = DRAWS * weights / weights.sum()
    counts = tokens.bincount(minlength=150).double()
    assert (counts[expected == 0] == 0).all()
    # Pearson's statistic over the tokens expected at least five times, the others being one more cell.
    common = expected >= 5
    cells = torch.cat((counts[common], counts[~common].sum().reshape(1)))
    means = torch.cat((expected[common], expected[~common].sum().reshape(1)))
    statistic = ((cells - means).square() / means.clamp(min=1e-9)).sum().item()
    freedom = int(common.sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@st.composite
def requests(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    size = draw(st.integers(1, 40))
    levels = st.one_of(st.just(-torch.inf), st.integers(-40, 4).map(lambda level: level / 4))
    logits = draw(st.lists(levels, min_size=size, max_size=size).filter(lambda row: max(row) > -torch.inf))
    return torch.tensor([logits]), tensors(
        1,
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 7.0])),
        top_k=draw(st.integers(-1, size + 2)),
        top_p=draw(st.sampled_from([0.01, 0.3, 0.77, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.001, 0.2, 1.0])),
    )


@settings(max_examples=400, deadline=None)
@given(requests(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1), st.sampled_from(list(TOLERANCE)))
def test_ties_masks_and_cuts_agree_with_the_reference(
    request: tuple[torch.Tensor, dict[str, torch.Tensor]], seed: int, offset: int, dtype: torch.dtype
) -> None:
    logits, filters = request
    counter = {"seed": torch.tensor([seed]), "offset": torch.tensor([offset])}
    token = tk.sample(logits.to(dtype), **filters, **counter).item()
    if token != sample_reference(logits.to(dtype), **filters, **counter).item():
        # Only a point that falls within rounding of the border between two tokens may go the other way.
        weights = sample_weights_reference(logits.to(dtype), **filters)[0]
        share = weights.cumsum(0) / weights.sum()
        point = philox_bits(seed, offset) / 2**64
        assert weights[token] > 0
        assert (share - point).abs().min() < 1e-6


def test_equal_logits_keep_the_lowest_ids() -> None:
    logits = torch.zeros(500, 64)
    logits[:, 3] = -0.0  # equal to zero, also where bits are compared
    offsets = torch.arange(500)
    assert set(tk.sample(logits, top_k=5, seed=1, offset=offsets).tolist()) == set(range(5))
    assert set(tk.sample(logits, top_p=0.25, seed=1, offset=offsets).tolist()) == set(range(16))
    assert (tk.sample(logits, temperature=0.0, seed=1, offset=offsets) == 0).all()
    logits[:, [17, 40]] = 1.0
    assert (tk.sample(logits, temperature=0.0, seed=1, offset=offsets) == 17).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_gets_the_same_token_in_any_company(dtype: torch.dtype) -> None:
    rows = 40
    asked = [DEFAULTS | FILTERS[name] for name in FILTERS]
    generator = torch.Generator().manual_seed(5)
    arguments: dict[str, Any] = {
        "logits": (3 * torch.randn(rows, 3001, generator=generator)).to(dtype),
        "seed": torch.randint(2**62, (rows,), generator=generator),
        "offset": torch.arange(rows),
    }
    for name, default in DEFAULTS.items():
        arguments[name] = torch.tensor([type(default)(asked[r % len(asked)][name]) for r in range(rows)])
    together = tk.sample(**arguments)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(tk.sample(**{name: value[order] for name, value in arguments.items()}), together[order])
    for r in range(rows):
        alone = tk.sample(**{name: value[r : r + 1] for name, value in arguments.items()})
        assert alone.item() == together[r].item()
    threads = torch.get_num_threads()
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            assert torch.equal(tk.sample(**arguments), together)
    finally:
        torch.set_num_threads(threads)


def test_extreme_logits_and_temperatures() -> None:
    logits = torch.tensor([[3e38, -3e38, 3e38, -torch.inf]])
    for offset in range(20):
        assert tk.sample(logits, seed=0, offset=offset).item() in (0, 2)
        assert tk.sample(logits, temperature=1e-45, top_p=0.5, seed=0, offset=offset).item() == 0
        assert tk.sample(logits, temperature=3e38, top_k=100, seed=0, offset=offset).item() < 3
    assert tk.sample(torch.tensor([[-5.0]]), top_p=0.1, min_p=1.0, top_k=1, seed=0, offset=0).tolist() == [0]


def test_scalars_lists_and_tensors_are_alike_also_compiled() -> None:
    logits = torch.randn(3, 100)

    def from_scalars(x: torch.Tensor) -> torch.Tensor:
        return tk.sample(x, temperature=0.7, top_k=9, top_p=0.8, min_p=0.01, seed=-3, offset=2)

    def from_lists(x: torch.Tensor) -> torch.Tensor:
        return tk.sample(
            x, temperature=[0.7] * 3, top_k=[9] * 3, top_p=[0.8] * 3, min_p=[0.01] * 3, seed=[-3] * 3, offset=[2] * 3
        )

    filters = tensors(3, temperature=0.7, top_k=9, top_p=0.8, min_p=0.01)
    expected = tk.sample(logits, **filters, seed=torch.full((3,), -3), offset=torch.full((3,), 2, dtype=torch.int32))
    for function in (from_scalars, from_lists):
        assert torch.equal(function(logits), expected)
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(logits), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_row_is_named_and_the_others_are_kept(bad: float, temperature: float) -> None:
    logits = torch.randn(4, 100)
    asked = {"temperature": temperature, "seed": 7, "offset": torch.arange(4)}
    expected = tk.sample(logits, **asked)
    expected[2] = -1
    logits[2, slice(None) if bad == -torch.inf else 99] = bad
    out = torch.full((4,), 123)
    with pytest.raises(ValueError, match=r"sample: logits: expected numbers and -inf.*, got NaN, .* in row 2"):
        tk.sample(logits, **asked, out=out)
    assert torch.equal(out, expected)


def test_bad_arguments_are_named() -> None:
    logits = torch.randn(2, 10)
    good: dict[str, Any] = {"seed": 0, "offset": 0}
    for name, value, message in [
        ("temperature", [1.0, -0.5], r"temperature: expected a finite value >= 0, got -0.5 in row 1"),
        ("temperature", torch.nan, r"temperature: expected a finite value >= 0, got nan in row 0"),
        ("top_k", -2, r"top_k: expected a value >= 1, or 0 or -1 for all, got -2 in row 0"),
        ("top_p", 0.0, r"top_p: expected 0 < top_p <= 1, got 0 in row 0"),
        ("min_p", [0.0, 1.5], r"min_p: expected 0 <= min_p <= 1, got 1.5 in row 1"),
        ("seed", 2**63, r"seed: expected a 64-bit number, got 9223372036854775808"),
        ("offset", [1, 2, 3], r"offset: expected shape \[S\] with S = 2 \(from logits\), got \[3\]"),
        ("logits", torch.randn(2, 0), r"logits: expected V from 1 to 2\^22, got 0"),
        ("logits", torch.randn(10), r"logits: expected shape \[S, V\], got \[10\]"),
        ("logits", torch.randn(10, 2).t(), r"logits: expected stride 1 in the last dimension"),
        ("min_p", torch.zeros(2, device="meta"), r"expected all tensors on one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            tk.sample(**({"logits": logits} | good | {name: value}))
    for name, value, message in [
        ("logits", logits.long(), r"logits: expected dtype float32, float16, bfloat16, got int64"),
        ("top_k", 5.0, r"top_k: expected an integer, or one per row, got 5.0"),
        ("seed", torch.zeros(2), r"seed: expected integers, got dtype torch.float32"),
        ("top_p", "0.9", r"top_p: expected a number, or one per row, got '0'"),
        ("out", torch.zeros(2, dtype=torch.int32), r"out: expected dtype int64, got int32"),
    ]:
        with pytest.raises(TypeError, match=message):
            tk.sample(**({"logits": logits} | good | {name: value}))
