"""The slim decoder loop: a checkpoint in, a scheduler and a paged cache around the operators, text out."""

from __future__ import annotations

from teco_kernels.decoder.async_engine import AsyncEngine, Stream
from teco_kernels.decoder.engine_thread import EngineClosedError, QueueFullError, StepError
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
    "AsyncEngine",
    "CompletionOutput",
    "EngineClosedError",
    "Logprob",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StepError",
    "Stream",
]
