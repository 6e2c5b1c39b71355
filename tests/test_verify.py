"""Verification of recycled tokens: agreeing prefixes, and a rejection rule that leaves the target's distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import teco_kernels as tk
from teco_kernels.ops.verify import verify_recycled_reference, verify_recycled_sampled_reference
from teco_kernels.testing import TOLERANCE

DRAWS = 40000


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 2**31))
def test_length_of_the_agreeing_prefix(sequences: int, recycled: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(2, (sequences, recycled + 3), generator=generator)[:, 1 : recycled + 2]
    ids = torch.randint(-1, 2, (sequences, recycled), generator=generator)
    accepted = tk.verify_recycled(target, ids)
    assert accepted.dtype == torch.int32
    assert torch.equal(accepted, verify_recycled_reference(target, ids))


def distribution(*shape: int, seed: int, zeros: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if zeros:
        logits[..., seed % 3 :: 3] = -torch.inf
    return logits.softmax(-1).to(dtype)


def chi_square_fits(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's statistic over the outcomes expected at least five times, the others being one more cell."""
    expected = counts.sum() * probabilities.double() / probabilities.double().sum()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    cells = torch.cat((counts[common], counts[~common].sum().reshape(1))).double()
    means = torch.cat((expected[common], expected[~common].sum().reshape(1)))
    statistic = ((cells - means).square() / means.clamp(min=1e-9)).sum().item()
    freedom = int(common.sum()) - (0 if means[-1] > 0 else 1)
    return statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("proposals", ["other", "same numbers", "deterministic"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_follow_the_target_jointly(dtype: torch.dtype, proposals: str) -> None:
    """Two recycled tokens and the one after them; q of the second, and p of all, depend on the tokens before.

    A sequence that is rejected early is continued from the target. The tokens are drawn from q with another generator,
    or by `sample` with the very seeds and offsets of the verification, or q is sure of one.
    """
    V, k = 4, 2
    p = [distribution(*[V] * (i + 1), seed=i, zeros=True, dtype=dtype) for i in range(k + 1)]
    q = [distribution(*[V] * (i + 1), seed=10 + i, dtype=dtype) for i in range(k)]
    if proposals == "deterministic":
        q = [torch.nn.functional.one_hot(rows.argmax(-1), V).to(dtype) for rows in q]
    generator, offsets = torch.Generator().manual_seed(7), torch.arange(DRAWS) * (k + 1)

    ids = torch.empty(DRAWS, 0, dtype=torch.int64)
    for i in range(k):
        rows = q[i][tuple(ids.t())] if i else q[0].expand(DRAWS, V)
        if proposals == "same numbers":
            drawn = tk.sample(rows.log(), seed=5, offset=offsets + i)
        else:
            drawn = torch.multinomial(rows.float(), 1, generator=generator)[:, 0]
        ids = torch.cat((ids, drawn[:, None]), dim=1)
    prefixes = [tuple(ids[:, :i].t()) for i in range(k + 1)]
    target = torch.stack([p[i][prefixes[i]] if i else p[0].expand(DRAWS, V) for i in range(k + 1)], dim=1)
    probs = torch.stack([q[i][prefixes[i]] if i else q[0].expand(DRAWS, V) for i in range(k)], dim=1)
    accepted, following = tk.verify_recycled_sampled(target, probs, ids, seed=5, offset=offsets)

    out = torch.cat((ids, following[:, None]), dim=1)
    out.scatter_(1, accepted.long()[:, None], following[:, None])
    for i in range(1, k + 1):
        missing = accepted < i
        rows = p[i][tuple(out[missing, :i].t())]
        out[missing, i] = torch.multinomial(rows.float(), 1, generator=generator)[:, 0]
    joint = p[0].double()
    for i in range(1, k + 1):
        joint = joint.unsqueeze(-1) * p[i].double()
    counts = (out[:, 0] * V * V + out[:, 1] * V + out[:, 2]).bincount(minlength=V**3)
    assert chi_square_fits(counts, joint.flatten())
    # As many as the rule promises: the sum of min(p, q) at the first place.
    overlap = torch.minimum(p[0].float(), q[0].float()).sum().item()
    assert (accepted > 0).float().mean().item() == pytest.approx(overlap, abs=0.015)


def one_hot(*tokens: int, size: int = 21) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([tokens]), size).float()


def verify(target: torch.Tensor, probs: torch.Tensor, ids: list[int], **numbers: Any) -> tuple[list[int], list[int]]:
    numbers = {"seed": 0, "offset": 0} | numbers
    accepted, following = tk.verify_recycled_sampled(target, probs, torch.tensor([ids], dtype=torch.int64), **numbers)
    return accepted.tolist(), following.tolist()


def test_edges_of_the_rule() -> None:
    flat = torch.full((1, 1, 21), 1 / 21)
    for offset in range(50):
        # The target never gives the token: rejected, and what is left of p is p.
        assert verify(one_hot(3, 4), one_hot(20), [20], offset=offset) == ([0], [3])
        # Both are sure of it: accepted, and the bonus token comes of the row behind.
        assert verify(one_hot(3, 20), one_hot(3), [3], offset=offset) == ([1], [20])
        # q cannot have given it: the limit of the rule accepts what p can give,
        assert verify(one_hot(3, 4), one_hot(5), [3], offset=offset) == ([1], [4])
        # and nothing else.
        accepted, following = verify(torch.cat((one_hot(3), flat), dim=1), one_hot(5), [7], offset=offset)
        assert (accepted, following) == ([0], [3])
        # All of p is below q but at one token.
        p, q = one_hot(2, 9), torch.full((1, 1, 21), 1 / 20)
        q[0, 0, 2] = 0
        assert verify(p, q, [6], offset=offset) == ([0], [2])
    # k = 0: a draw from p.
    assert verify(one_hot(17), torch.empty(1, 0, 21), []) == ([0], [17])


def test_a_rejection_that_is_only_rounding_draws_from_the_target() -> None:
    """p is below q by one unit in the last place at the token, and equal elsewhere."""
    q = torch.zeros(1, 1, 8)
    q[0, 0, :2] = torch.tensor([0.5, 0.5])
    p = torch.cat((q, one_hot(1, size=8)), dim=1)
    p[0, 0, 0] = 0.0
    p[0, 0, 1] = 0.5
    draws = {verify(p, q, [0], offset=offset)[1][0] for offset in range(20)}
    assert draws == {1}


def test_same_in_any_company_and_any_layout() -> None:
    p, q = distribution(40, 3, 1003, seed=1), distribution(40, 2, 1003, seed=2)
    ids = torch.multinomial(q.view(80, 1003), 1, generator=torch.Generator().manual_seed(3)).view(40, 2)
    seeds, offsets = torch.arange(40) * 10**15, torch.arange(40)
    together = tk.verify_recycled_sampled(p, q, ids, seed=seeds, offset=offsets)
    expected = verify_recycled_sampled_reference(p, q, ids, seed=seeds, offset=offsets)
    assert torch.equal(together[0], expected[0])
    assert torch.equal(together[1], expected[1])
    assert len(set(together[0].tolist())) == 3
    wide = torch.zeros(3, 40, 1010).transpose(0, 1)
    wide[:, :, 3:1006] = p
    for s in (0, 7, 39):
        strided = wide[s : s + 1, :, 3:1006]
        alone = tk.verify_recycled_sampled(
            strided, q[s : s + 1], ids[s : s + 1], seed=seeds[s : s + 1], offset=offsets[s : s + 1]
        )
        assert (alone[0].item(), alone[1].item()) == (together[0][s].item(), together[1][s].item())


def test_what_is_refused_is_named() -> None:
    p, q, ids = distribution(3, 3, 8, seed=1), distribution(3, 2, 8, seed=2), torch.ones(3, 2, dtype=torch.int64)

    def call(target: Any = p, probs: Any = q, token_ids: Any = ids, **options: Any) -> Any:
        return tk.verify_recycled_sampled(target, probs, token_ids, **({"seed": 1, "offset": 2} | options))

    with pytest.raises(ValueError, match=r"target_probs: expected shape \[S, k \+ 1, V\] with k \+ 1 = 3"):
        call(target=p[:, :2])
    with pytest.raises(TypeError, match=r"target_probs: expected the dtype of recycled_probs \(float32\), got float16"):
        call(target=p.half())
    with pytest.raises(ValueError, match=r"recycled_token_ids: expected 0 to 7, got 8 at \[0, 1\]"):
        call(token_ids=torch.tensor([[1, 8], [0, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"recycled_token_ids: expected shape \[S, k\] with S = 3"):
        call(token_ids=ids[:2])
    with pytest.raises(TypeError, match=r"verify_recycled_sampled: seed: expected integers, got dtype torch.float32"):
        call(seed=torch.ones(3))
    with pytest.raises(ValueError, match=r"verify_recycled: target_token_ids: .* with k \+ 1 = 3"):
        tk.verify_recycled(ids, ids)
    with pytest.raises(TypeError, match=r"verify_recycled: recycled_token_ids: expected dtype int64, got int32"):
        tk.verify_recycled(torch.ones(3, 3, dtype=torch.int64), ids.int())


@pytest.mark.parametrize("bad", [torch.nan, -0.1, 1.5, torch.inf])
@pytest.mark.parametrize("where", ["target", "recycled"])
def test_what_is_no_probability_is_named(where: str, bad: float) -> None:
    """At the token that is decided on, and anywhere in a row that is drawn from; other sequences are right."""
    p, q = one_hot(3, 4).repeat(3, 1, 1), one_hot(3).repeat(3, 1, 1)
    q[1] = one_hot(5)[0]  # rejected: its first rows are drawn from
    ids = torch.tensor([[3], [5], [3]])
    (p if where == "target" else q)[1, 0, 20] = bad
    out = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    message = "target_probs, recycled_probs: expected numbers from 0 to 1, .* in sequence 1"
    with pytest.raises(ValueError, match=message):
        tk.verify_recycled_sampled(p, q, ids, seed=0, offset=0, out=out)
    assert out[0].tolist() == [1, 0, 1]
    assert out[1].tolist() == [4, -1, 4]
    (p if where == "target" else q)[1, 0, 5] = bad
    with pytest.raises(ValueError, match=message):
        tk.verify_recycled_sampled(p, q, ids, seed=0, offset=0)


def test_a_row_of_zeros_to_draw_from_is_refused() -> None:
    with pytest.raises(ValueError, match="not all of them 0, got others in sequence 0"):
        tk.verify_recycled_sampled(
            torch.zeros(1, 1, 9), torch.empty(1, 0, 9), torch.empty(1, 0).long(), seed=0, offset=0
        )
