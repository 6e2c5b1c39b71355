"""As much of Triton's Python backend as the model calls, to run it in this process: `triton_python_backend_utils`."""

from __future__ import annotations

import json
import queue
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

FINAL = 1


class TritonModelException(Exception):  # noqa: N818 (the backend's name)
    """Raised by the backend."""


@dataclass
class TritonError:
    """An error as a response has it."""

    message: str
    code: str = "INTERNAL"

    INTERNAL = "INTERNAL"
    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"


@dataclass
class Tensor:
    """A tensor of a request or a response."""

    _name: str
    values: np.ndarray[Any, Any]

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self.values


@dataclass
class InferenceResponse:
    """Tensors, or an error."""

    output_tensors: list[Tensor]
    error: TritonError | None = None

    def text(self) -> str:
        return self.output_tensors[0].values[0].decode()


@dataclass
class Request:
    """A request, and its own response sender; notes what the real one forbids."""

    tensors: dict[str, np.ndarray[Any, Any]]
    params: dict[str, Any] = field(default_factory=dict)
    cancelled: bool = False
    responses: queue.SimpleQueue[tuple[InferenceResponse, int]] = field(default_factory=queue.SimpleQueue)
    is_closed: bool = False
    misuse: list[str] = field(default_factory=list)

    def get_response_sender(self) -> Request:
        return self

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, values) for name, values in self.tensors.items()]

    def parameters(self) -> str:
        return json.dumps(self.params) if self.params else ""

    def is_cancelled(self) -> bool:
        if self.is_closed:
            self.misuse.append("asked whether it was cancelled after its last response")
        return self.cancelled

    def send(self, response: InferenceResponse, flags: int) -> None:
        if self.is_closed:
            self.misuse.append("sent after its last response")
        self.is_closed = flags == FINAL
        self.responses.put((response, flags))

    def wait(self) -> list[InferenceResponse]:
        """All responses, once they are there."""
        responses = []
        while True:
            response, flags = self.responses.get(timeout=30)
            responses.append(response)
            if flags == FINAL:
                assert not self.misuse
                return responses


class Metric:
    """A number."""

    def __init__(self) -> None:
        self.value = 0

    def set(self, value: int) -> None:
        self.value = value

    def increment(self, value: int) -> None:
        assert value > 0
        self.value += value


class MetricFamily:
    """Numbers by labels."""

    COUNTER, GAUGE = "counter", "gauge"
    supported = True

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        if not self.supported:
            raise TritonModelException("metrics not supported")
        self.metrics: dict[str, Metric] = {}

    def Metric(self, *, labels: dict[str, str]) -> Metric:  # noqa: N802 (the backend's name)
        return self.metrics.setdefault(json.dumps(labels), Metric())


def fake_backend() -> ModuleType:
    """The module."""
    module = ModuleType("triton_python_backend_utils")
    for thing in (TritonModelException, TritonError, Tensor, InferenceResponse, MetricFamily):
        setattr(module, thing.__name__, thing)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    return module
