"""What a request asks for and what it gets; names and defaults are vLLM's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# The sampler takes fp32 and int64: what these cannot hold must not fail a step that other requests share.
_FP32_TINY, _FP32_MAX, _INT64_MAX = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127, 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    Attributes
    ----------
    n : int
        Answers per prompt; they share its KV blocks.
    temperature, top_k, top_p, min_p
        As in `teco_kernels.ops.sample`; temperature 0 is greedy.
    presence_penalty, frequency_penalty : float
        Subtracted from the logit of every token generated so far: once, and times its count.
    repetition_penalty : float
        Divides positive and multiplies negative logits of tokens in the prompt or the answer.
    logit_bias : dict of int to float, optional
        Added to the logits of these tokens.
    max_tokens : int or None
        Most tokens to generate; None: as many as the context and the cache can hold.
    min_tokens : int
        No end-of-sequence or stop token is drawn before so many.
    stop : str or list of str, optional
        Texts that end the answer and are cut off it, unless `include_stop_str_in_output`.
    stop_token_ids : list of int, optional
        Tokens that end the answer, beside the model's end-of-sequence tokens (which `ignore_eos` turns off).
    seed : int, optional
        With it the answer is the same in every run and any company; without, one is drawn on arrival.
    logprobs : int, optional
        Report each token's log-probability, and this many of the likeliest, by the model's unchanged logits.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        def require_number(name: str, low: float, high: float, expected: str) -> None:
            value = getattr(self, name)
            require(_is_number(value) and low <= value <= high, name, expected)

        require(_is_int(self.n) and self.n >= 1, "n", "a positive integer")
        require_number("temperature", 0, _FP32_MAX, "a number >= 0 that fp32 can hold")
        require_number("top_p", _FP32_TINY, 1, "a number in (0, 1]")
        require(
            _is_int(self.top_k) and -1 <= self.top_k <= _INT64_MAX, "top_k", "a positive 64-bit integer, or 0 or -1"
        )
        require_number("min_p", 0, 1, "a number in [0, 1]")
        require_number("presence_penalty", -2, 2, "a number in [-2, 2]")
        require_number("frequency_penalty", -2, 2, "a number in [-2, 2]")
        require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a positive number",
        )
        require(
            self.logit_bias is None
            or (
                isinstance(self.logit_bias, Mapping)
                and all(_is_int(token) and _is_number(bias) for token, bias in self.logit_bias.items())
            ),
            "logit_bias",
            "a mapping of token ids to numbers",
        )
        require(_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "an integer >= 0")
        require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= max(self.min_tokens, 1)),
            "max_tokens",
            "a positive integer that is not below min_tokens, or None",
        )
        require(
            isinstance(self.stop, str | None)
            or (isinstance(self.stop, list | tuple) and all(isinstance(stop, str) for stop in self.stop)),
            "stop",
            "a text or a list of texts",
        )
        require(all(self.stop_strings), "stop", "texts that are not empty")
        require(
            self.stop_token_ids is None
            or (isinstance(self.stop_token_ids, list | tuple) and all(map(_is_int, self.stop_token_ids))),
            "stop_token_ids",
            "a list of token ids",
        )
        require(self.seed is None or _is_int(self.seed), "seed", "an integer or None")
        require(
            self.logprobs is None or (_is_int(self.logprobs) and self.logprobs >= 0),
            "logprobs",
            "an integer >= 0 or None",
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Logprob(NamedTuple):
    """Log-probability of a token at one position; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One answer.

    Attributes
    ----------
    text, token_ids
        The answer so far; `token_ids` includes a stop token, `text` does not.
    new_text : str
        What `text` grew by since the request's last output; never part of a stop string, nor, before the end, of a
        character.
    cumulative_logprob : float or None
        Sum over `token_ids`, when log-probabilities were asked for.
    logprobs : list of dict or None
        Per token: the token itself and the likeliest, by token id.
    finish_reason : str or None
        "stop", "length", "error", "abort", or None while it runs.
    stop_reason : int, str or None
        The stop token or text that ended it; None for an end-of-sequence token.
    error : str or None
        What went wrong, when `finish_reason` is "error".
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    new_text: str = ""
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass
class RequestMetrics:
    """Times are seconds of `time.monotonic`; `num_cached_tokens` of the prompt came from the prefix cache."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0


@dataclass
class RequestOutput:
    """A request and its `n` answers, finished or as far as they are."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


class RequestError(ValueError):
    """Some requests of a `generate` call failed; all others ran to their end.

    Attributes
    ----------
    outputs : list of RequestOutput
        Of all requests; the failed ones have finish reason "error".
    """

    def __init__(self, message: str, outputs: list[RequestOutput]) -> None:
        super().__init__(message)
        self.outputs = outputs


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Finite; also no integer that is too large to become a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
