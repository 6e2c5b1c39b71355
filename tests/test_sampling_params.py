"""SamplingParams refuses what it cannot mean, and keeps vLLM's names and defaults."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from teco_kernels import SamplingParams


def test_names_and_defaults_are_vllms() -> None:
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    assert defaults == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "seed": None,
        "logprobs": None,
    }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 1.0, True, None, "2"]),
        ("temperature", [-0.1, float("nan"), float("inf"), 1e39, 10**400, "1", None, True]),
        ("top_p", [0, 1e-320, 1.1, -1, float("nan"), None, "0.9"]),
        ("top_k", [-2, 1.5, 2**63, None]),
        ("min_p", [-0.1, 1.1, float("nan"), None]),
        ("presence_penalty", [-2.1, 2.1, float("nan"), "0"]),
        ("frequency_penalty", [-2.1, 2.1, None]),
        ("repetition_penalty", [0, -1, float("inf"), "1"]),
        ("logit_bias", [[1, 2], {"1": 0.5}, {1: "x"}, {1: float("nan")}, {1: 10**400}, {1.5: 1}]),
        ("max_tokens", [0, -5, 1.5, "16"]),
        ("min_tokens", [-1, 0.5, None, 17]),
        ("stop", ["", ["a", ""], 5, [1], {"a": 1}]),
        ("stop_token_ids", [5, ["a"], [1.5], [True]]),
        ("seed", [1.5, "1", True]),
        ("logprobs", [-1, 0.5, True, "1"]),
    ],
)
def test_bad_values_are_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^(max_tokens|{name}): expected .*, got "):
            SamplingParams(**{name: value})


def test_good_edges_are_taken() -> None:
    SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=1, max_tokens=None, min_tokens=5, seed=-1, logprobs=0)
    SamplingParams(presence_penalty=-2, frequency_penalty=2, max_tokens=3, min_tokens=3, logit_bias={}, stop=[])
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=("a", "bc")).stop_strings == ("a", "bc")
