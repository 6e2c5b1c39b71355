"""The slim decoder loop: a checkpoint in, a scheduler and a paged cache around the operators, text out."""

from __future__ import annotations

from teco_kernels.decoder.llm import LLM
from teco_kernels.decoder.sampling_params import (
    CompletionOutput,
    Logprob,
    RequestError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]
