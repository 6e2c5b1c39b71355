"""Operators of the recycle head: the bits of the operators they stand for, in any company, and clear errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import teco_kernels as tk
from teco_kernels.ops import Plan
from teco_kernels.ops._library import cpu_isa_choices
from teco_kernels.ops.recycle import Weight
from teco_kernels.testing import TOLERANCE
from teco_kernels.testing.cases.matmul import random_checkpoint, random_minima

DTYPES = list(TOLERANCE)
HIDDEN, VOCAB = 96, 224
KINDS = ["plain", "fp16 plain", "packed", "bf16 packed", "2-bit", "3-bit order", "4-bit minimum", "8-bit"]
ROWS = (1, 2, 3, 4, 5, 9, 33, 600)


def a_weight(kind: str, in_features: int, out_features: int, generator: torch.Generator) -> Weight:
    if kind[0].isdigit():
        minimum = kind.endswith("minimum")
        tensors = (random_minima if minimum else random_checkpoint)(
            in_features, out_features, 32, int(kind[0]), generator, **({"act_order": True} if "order" in kind else {})
        )
        bias = torch.randn(out_features, generator=generator)
        return (tk.GPTQWeight.from_codes if minimum else tk.GPTQWeight.from_checkpoint)(**tensors, bias=bias)
    dtype = {"f": torch.float16, "b": torch.bfloat16, "p": torch.float32}[kind[0]]
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator)
    return tk.DenseWeight.from_tensor(weight, bias) if kind.endswith("packed") else weight


def activations(kind: str) -> tuple[str, ...]:
    return ("exact", "int8") if kind[0].isdigit() else ("exact",)


def matmul(x: torch.Tensor, weight: Weight, activation: Any) -> torch.Tensor:
    """The package's own, for any weight."""
    if isinstance(weight, tk.GPTQWeight):
        return tk.gptq_matmul(x, weight, activation=activation)
    return tk.dense_matmul(x, tk.DenseWeight.from_tensor(weight) if isinstance(weight, torch.Tensor) else weight)


def first_largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = logits.amax(-1)
    ids = torch.arange(logits.shape[-1]).expand_as(logits)
    return torch.where(logits == largest[:, None], ids, logits.shape[-1]).amin(-1), largest


def head_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """hidden (in a wider matrix), token_ids, embedding, hidden_norm, embedding_norm."""
    hidden = 3 * torch.randn(rows, HIDDEN + 8, generator=generator).to(dtype)[:, 4 : HIDDEN + 4]
    token_ids = torch.randint(50, (rows,), generator=generator)
    embedding = torch.randn(50, HIDDEN, generator=generator).half()
    norms = torch.randn(2, HIDDEN, generator=generator).to(dtype)
    return hidden, token_ids, embedding, norms[0], norms[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_projection_has_the_bits_of_its_parts(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    projection = a_weight(kind, 2 * HIDDEN, HIDDEN, generator)
    for rows in ROWS:
        hidden, token_ids, embedding, hidden_norm, embedding_norm = inputs = head_inputs(rows, dtype, generator)
        embedded = tk.rms_norm(tk.embedding(token_ids, embedding, dtype=dtype), embedding_norm, 1e-5)
        joined = torch.cat((embedded, tk.rms_norm(hidden, hidden_norm, 1e-5)), dim=-1)
        for activation in activations(kind):
            out = tk.recycle_project(*inputs, projection, 1e-5, activation=activation)
            assert out.dtype == dtype
            assert torch.equal(out, matmul(joined, projection, activation)), (rows, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_projection_of_a_packed_embedding(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    embedding = a_weight(f"{bits}-bit" + " order" * (bits == 3), HIDDEN, VOCAB, generator)
    assert isinstance(embedding, tk.GPTQWeight)
    rows = embedding.dequantize().t().to(dtype).contiguous()
    for kind in ("packed", "4-bit minimum"):
        projection = a_weight(kind, 2 * HIDDEN, HIDDEN, generator)
        for count in (1, 5, 530):
            hidden, _, _, *norms = head_inputs(count, dtype, generator)
            token_ids = torch.randint(VOCAB, (count,), generator=generator)
            expected = tk.recycle_project(hidden, token_ids, rows, *norms, projection, 1e-5)
            assert torch.equal(tk.recycle_project(hidden, token_ids, embedding, *norms, projection, 1e-5), expected)
    with pytest.raises(ValueError, match=r"recycle_project: token_ids: expected 0 to 223 .*, got 224 at index 0"):
        tk.recycle_project(hidden[:1], torch.tensor([224]), embedding, *norms, projection, 1e-5)
    with pytest.raises(ValueError, match=r"recycle_project: embedding: expected rows of the 95 elements .*, got 96"):
        tk.recycle_project(hidden[:1, :95], torch.tensor([0]), embedding, *norms, projection, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_argmax_has_the_bits_of_the_logits(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = a_weight(kind, HIDDEN, VOCAB, generator)
    for rows in ROWS:
        hidden = torch.randn(rows, HIDDEN + 8, generator=generator).to(dtype)[:, 4 : HIDDEN + 4]
        for activation in activations(kind):
            token_ids, logit = tk.lm_head_argmax(hidden, weight, activation=activation)
            expected = first_largest(matmul(hidden.float(), weight, activation))
            assert torch.equal(token_ids, expected[0]), (rows, activation)
            assert torch.equal(logit, expected[1]), (rows, activation)


@pytest.mark.parametrize("vocab_size", [1, 5, 8, 13, 16, 21, 61])
def test_last_panel_of_the_vocabulary(vocab_size: int) -> None:
    """What fills it up is never the largest, not even among negative logits and infinities."""
    generator = torch.Generator().manual_seed(vocab_size)
    weight, hidden = -torch.rand(vocab_size, 40, generator=generator), torch.rand(70, 40, generator=generator)
    hidden[3] = torch.inf
    for head in (weight, tk.DenseWeight.from_tensor(weight)):
        token_ids, logit = tk.lm_head_argmax(hidden, head)
        expected = first_largest(tk.dense_matmul(hidden, tk.DenseWeight.from_tensor(weight)))
        assert torch.equal(token_ids, expected[0])
        assert torch.equal(logit, expected[1])
        assert logit[3] == -torch.inf
        assert token_ids[3] == 0


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_lowest_id_wins_ties(rows: int) -> None:
    """Wherever the equal logits lie: in one vector, one panel, or panels of other tasks; +0 equals -0."""
    hidden = torch.ones(rows, 8)
    for first, second in ((3, 5), (3, 12), (15, 16), (17, 3999), (2500, 2501)):
        weight = torch.zeros(4000, 8)
        weight[[first, second]] = 1
        token_ids, logit = tk.lm_head_argmax(hidden, tk.DenseWeight.from_tensor(weight))
        assert token_ids.tolist() == [first] * rows
        assert logit.tolist() == [8] * rows
    negative = -torch.ones(4000, 8)
    negative[5], negative[900] = -0.0, 0.0
    assert tk.lm_head_argmax(hidden, negative)[0].tolist() == [5] * rows


@pytest.mark.parametrize("rows", [1, 6, 70])
@pytest.mark.parametrize("activation", ["exact", "int8"])
def test_any_number_of_threads_gives_the_same(activation: Any, rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = a_weight("4-bit", 256, 8192, generator)
    hidden = torch.randn(rows, 256, generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [confidence(hidden, weight, activation=activation) for _ in range(10)]
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("kind", ["plain", "packed", "8-bit"])
def test_nan_is_named_and_other_rows_are_right(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = a_weight(kind, HIDDEN, VOCAB, generator)
    hidden = torch.randn(5, HIDDEN, generator=generator)
    expected = tk.lm_head_argmax(hidden, weight)
    hidden[2, 7] = hidden[4, 0] = torch.nan
    out = torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    with pytest.raises(ValueError, match="lm_head_argmax: hidden: expected logits that are numbers, got NaN in row 2"):
        tk.lm_head_argmax(hidden, weight, out=out)
    assert out[0].tolist() == [*expected[0][:2].tolist(), -1, int(expected[0][3]), -1]
    assert out[1].isnan().tolist() == [False, False, True, False, True]
    assert torch.equal(out[1][[0, 1, 3]], expected[1][[0, 1, 3]])


def confidence(hidden: torch.Tensor, weight: Weight, **options: Any) -> tuple[torch.Tensor, ...]:
    """token_ids, logit, logsumexp."""
    logsumexp = torch.full(hidden.shape[:1], 7.0)
    return *tk.lm_head_argmax(hidden, weight, logsumexp=logsumexp, **options), logsumexp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logsumexp_of_the_logits(kind: str, dtype: torch.dtype) -> None:
    """Token and logit keep their bits beside it; a row's does not depend on the others, nor on where it lies."""
    generator = torch.Generator().manual_seed(7)
    weight = a_weight(kind, HIDDEN, VOCAB, generator)
    scales = torch.tensor([0.01, 0.2, 1.0, 30.0]).repeat(150)[:, None]  # from all alike to one above all
    hidden = (scales * torch.randn(600, HIDDEN + 8, generator=generator)).to(dtype)[:, 4 : HIDDEN + 4]
    for activation in activations(kind):
        token_ids, logit, logsumexp = confidence(hidden, weight, activation=activation)
        expected = tk.lm_head_argmax(hidden, weight, activation=activation)
        assert torch.equal(token_ids, expected[0])
        assert torch.equal(logit, expected[1])
        logits = matmul(hidden.float(), weight, activation).double()
        exact = logits.logsumexp(-1)
        assert ((logsumexp - exact).abs() <= 1e-6 + 5e-7 * exact.abs()).all()
        probability = (logit - logsumexp).exp()
        torch.testing.assert_close(
            probability.double(), logits.softmax(-1).amax(-1), rtol=1e-5 + 1e-7 * float(logit.abs().max()), atol=0
        )
        assert (probability <= 1).all()
        for rows in ROWS:
            for first in (0, 600 - rows):
                some = confidence(hidden[first : first + rows], weight, activation=activation)
                assert torch.equal(some[2], logsumexp[first : first + rows]), (rows, activation)


@pytest.mark.parametrize("vocab_size", [1, 5, 8, 13, 16, 21, 61, 130])
def test_logsumexp_of_the_last_panel(vocab_size: int) -> None:
    """What fills up panels and vectors of panels counts nothing, however far below zero the logits are."""
    generator = torch.Generator().manual_seed(vocab_size)
    weight, hidden = -torch.rand(vocab_size, 40, generator=generator), torch.rand(7, 40, generator=generator)
    hidden *= torch.tensor([0.0, 1e-3, 1, 10, 100, 1e4, 1e30])[:, None]
    bias = torch.randn(vocab_size, generator=generator)
    for head in (weight, tk.DenseWeight.from_tensor(weight), tk.DenseWeight.from_tensor(weight, bias)):
        _, logit, logsumexp = confidence(hidden, head)
        expected = matmul(hidden, head, "exact").double().logsumexp(-1)
        torch.testing.assert_close(logsumexp.double(), expected, rtol=5e-7, atol=1e-6)
        assert (logsumexp >= logit).all()
        if vocab_size == 1:
            assert torch.equal(logsumexp, logit)


def test_logsumexp_of_any_logits_that_are_numbers() -> None:
    """Beyond the range of exp on both sides, also in one panel, and with panels of nothing but -inf."""
    for logits in (
        torch.full((100,), 3e38),
        torch.full((100,), -3e38),
        torch.linspace(-3, 3, 100) * 1e38,
        torch.linspace(80, 120, 100),
        torch.tensor([-torch.inf] * 37 + [-200.0] + [-torch.inf] * 62),
        torch.zeros(49_152),
    ):
        head = tk.DenseWeight.from_tensor(torch.zeros(len(logits), 8), logits)
        logsumexp = confidence(torch.ones(2, 8), head)[2]
        expected = logits.double().logsumexp(-1).expand(2)
        torch.testing.assert_close(logsumexp.double(), expected, rtol=5e-7, atol=0)


def test_logsumexp_of_infinities_and_nan() -> None:
    """An infinity where that is the largest logit; NaN in the rows that are refused, and in these only."""
    generator = torch.Generator().manual_seed(8)
    weight, hidden = torch.rand(50, 4, generator=generator) + 0.1, torch.rand(4, 4, generator=generator)
    expected = confidence(hidden, weight)[2]
    hidden[1, 0], hidden[2, 0] = -torch.inf, torch.inf
    token_ids, logit, logsumexp = confidence(hidden, weight)
    assert token_ids[1:3].tolist() == [0, 0]
    assert logit[1:3].tolist() == logsumexp[1:3].tolist() == [-torch.inf, torch.inf]
    assert torch.equal(logsumexp[[0, 3]], expected[[0, 3]])
    one = torch.zeros(50)
    one[33] = torch.inf
    assert confidence(hidden[:1], tk.DenseWeight.from_tensor(weight, one))[2].item() == torch.inf
    for column in (0, 49):
        bias = torch.zeros(50)
        bias[column] = torch.nan
        logsumexp.zero_()
        with pytest.raises(ValueError, match="NaN in row 0"):
            tk.lm_head_argmax(hidden, tk.DenseWeight.from_tensor(weight, bias), logsumexp=logsumexp)
        assert logsumexp.isnan().all()
    hidden[1, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN in row 1"):
        tk.lm_head_argmax(hidden, weight, logsumexp=logsumexp)
    assert logsumexp[1].isnan()
    assert torch.equal(logsumexp[[0, 3]], expected[[0, 3]])


def test_lower_instruction_sets_hold_the_same() -> None:
    """What of this file is about the logsumexp, under every instruction set that this processor has besides."""
    if "TECO_CPU_ISA" in os.environ:
        pytest.skip("already running under a forced instruction set")
    for isa in cpu_isa_choices()[1:]:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "logsumexp or threads"],
            env=os.environ | {"TECO_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr


def test_a_nan_of_one_token_is_seen() -> None:
    weight = torch.randn(5000, 16)
    weight[4321, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN in row 0"):
        tk.lm_head_argmax(torch.randn(3, 16), tk.DenseWeight.from_tensor(weight))


def test_a_plan_replays_the_whole_head() -> None:
    """Projection of the token that the argmax before it found; a row without one stays NaN, and harms nothing."""
    generator = torch.Generator().manual_seed(5)
    projection = a_weight("4-bit", 2 * HIDDEN, HIDDEN, generator)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    norms = torch.randn(2, HIDDEN, generator=generator)
    hidden, out = torch.randn(3, HIDDEN, generator=generator), torch.empty(3, HIDDEN)
    token_ids, logit, logsumexp = torch.empty(3, dtype=torch.int64), torch.empty(3), torch.empty(3)
    target, accepted = torch.zeros(3, 2, dtype=torch.int64), torch.empty(3, dtype=torch.int32)

    def calls() -> None:
        tk.lm_head_argmax(hidden, embedding, logsumexp=logsumexp, out=(token_ids, logit))
        tk.recycle_project(hidden, token_ids, embedding, norms[0], norms[1], projection, 1e-5, out=out)
        tk.verify_recycled(target, token_ids[:, None], out=accepted)

    kept = (hidden, embedding, norms, projection, out, token_ids, logit, logsumexp, target, accepted)
    plan = Plan(calls, keep_alive=kept)
    hidden.normal_(generator=generator)
    expected = confidence(hidden, embedding)
    target[1, 0] = expected[0][1]
    plan.replay()
    assert torch.equal(token_ids, expected[0])
    assert torch.equal(logit, expected[1])
    assert torch.equal(logsumexp, expected[2])
    projected = tk.recycle_project(hidden, token_ids, embedding, norms[0], norms[1], projection, 1e-5)
    assert torch.equal(out, projected)
    assert accepted[1] == 1
    hidden[0] = torch.nan
    plan.replay()
    assert token_ids.tolist() == [-1, *expected[0][1:].tolist()]
    assert logsumexp[0].isnan()
    assert torch.equal(logsumexp[1:], expected[2][1:])
    assert out[0].isnan().all()
    assert torch.equal(out[1:], projected[1:])


def test_what_is_refused_is_named() -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, token_ids, *rest = head_inputs(2, torch.float32, generator)
    projection = a_weight("packed", 2 * HIDDEN, HIDDEN, generator)

    def project(**changed: Any) -> None:
        names = ("hidden", "token_ids", "embedding", "hidden_norm", "embedding_norm", "projection", "eps")
        values = dict(zip(names, (hidden, token_ids, *rest, projection, 1e-5), strict=True))
        tk.recycle_project(**(values | changed))

    for argument, bad, error, message in (
        ("token_ids", torch.tensor([0, 50]), ValueError, r"expected 0 to 49 .*, got 50 at index 1"),
        ("token_ids", torch.tensor([0]), ValueError, r"expected shape \[T\] with T = 2 \(from hidden\), got \[1\]"),
        ("embedding", torch.ones(50, 95), ValueError, r"with hidden_size = 96 \(from hidden\), got \[50, 95\]"),
        ("hidden_norm", torch.ones(95), ValueError, r"with hidden_size = 96 \(from hidden\), got \[95\]"),
        ("embedding_norm", torch.ones(96).half(), TypeError, r"expected the dtype of hidden \(float32\), got float16"),
        ("projection", torch.ones(96, 96), ValueError, r"expected 2 \* hidden_size = 192 input features, got 96"),
        ("projection", torch.ones(192), ValueError, r"expected shape \[out_features, in_features\], got \[192\]"),
        ("projection", torch.ones(96, 192).int(), TypeError, r"expected dtype float32, .* got int32"),
        ("projection", "weight", TypeError, "expected a tensor, a DenseWeight or a GPTQWeight, got str"),
        ("eps", -1.0, ValueError, "expected a value >= 0, got -1"),
        ("out", torch.empty(2, 95), ValueError, r"with out_features = 96 \(from projection\), got \[2, 95\]"),
        ("out", hidden, ValueError, "expected memory apart from that of hidden"),
    ):
        with pytest.raises(error, match=f"recycle_project: {argument}: .*{message}"):
            project(**{argument: bad})
    head = a_weight("8-bit", HIDDEN, VOCAB, generator)
    with pytest.raises(ValueError, match=r"lm_head_argmax: hidden: .* hidden_size = 96 \(from weight\), got \[2, 95\]"):
        tk.lm_head_argmax(torch.ones(2, 95), head)
    with pytest.raises(ValueError, match="expected 'exact' or 'int8', got 'int4'"):
        tk.lm_head_argmax(hidden, head, activation="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lm_head_argmax: weight: expected a vocabulary of 1"):
        tk.lm_head_argmax(hidden, torch.ones(0, HIDDEN))
    with pytest.raises(TypeError, match=r"lm_head_argmax: out\[0\]: expected dtype int64, got int32"):
        tk.lm_head_argmax(hidden, head, out=(torch.zeros(2, dtype=torch.int32), torch.zeros(2)))
    out, x = (torch.zeros(2, dtype=torch.int64), torch.zeros(2)), torch.ones(2, HIDDEN)
    for bad, error, message in (
        (torch.zeros(2).half(), TypeError, "expected dtype float32, got float16"),
        (torch.zeros(3), ValueError, r"expected shape \[T\] with T = 2 \(from hidden\), got \[3\]"),
        (torch.zeros(2, 1), ValueError, r"expected shape \[T\], got \[2, 1\]"),
        (torch.zeros(2, 2)[:, 0], ValueError, "contiguous"),
        (x[0, :2], ValueError, "expected memory apart from that of hidden"),
        (out[0].view(torch.float32)[1:3], ValueError, r"expected memory apart from that of out\[0\]"),
        (out[1], ValueError, r"expected memory apart from that of out\[1\]"),
    ):
        with pytest.raises(error, match=f"lm_head_argmax: logsumexp: .*{message}"):
            tk.lm_head_argmax(x, head, logsumexp=bad, out=out)
