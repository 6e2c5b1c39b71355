"""The engine's numbers among those of the server, for Prometheus."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from teco_kernels.decoder.async_engine import AsyncEngine
from teco_kernels.integrations.engine_numbers import COUNTERS, GAUGES
from teco_kernels.ops import kernel_calls

# Of all of them, those that tell how the model does; each has a family of its own in the server.
_COUNTERS = (
    *("steps", "prompt_tokens", "generated_tokens", "guessed_tokens"),
    *("accepted_tokens", "preemptions", "requests_refused"),
)
_GAUGES = "requests_running", "requests_waiting", "requests_open", "kv_blocks", "kv_blocks_used"
_KERNELS = "paged_attention", "reshape_and_cache", "gptq_matmul", "dense_matmul"


class EngineMetrics:
    """Numbers of one model; the server has them at its own address for metrics, unless it was told to have none.

    Parameters
    ----------
    engine : AsyncEngine
    labels : dict of str to str
        Of the model.
    """

    def __init__(self, engine: AsyncEngine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._last: dict[Any, int] = {}
        self._metrics: dict[Any, Any] = {}
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        try:
            self._families = {
                **{name: _family(f"{name}_total", COUNTERS[name], counter) for name in _COUNTERS},
                **{name: _family(name, GAUGES[name], gauge) for name in _GAUGES},
                "kernel_calls": _family("kernel_calls_total", "Runs of a kernel", counter),
            }
        except pb_utils.TritonModelException as error:
            if "metrics not supported" not in str(error):
                raise
            return
        for name in (*_COUNTERS, *_GAUGES):
            self._metrics[name] = self._families[name].Metric(labels=labels)
        for kernel in _KERNELS:
            self._metrics[kernel] = self._families["kernel_calls"].Metric(labels={**labels, "kernel": kernel})

    def report(self) -> None:
        """Tell the server what has changed."""
        numbers = self._engine.metrics() | {kernel: kernel_calls(kernel) for kernel in _KERNELS}
        for name, metric in self._metrics.items():
            if numbers[name] == self._last.get(name, 0):
                continue
            if name in _GAUGES:
                metric.set(numbers[name])
            else:
                metric.increment(numbers[name] - self._last.get(name, 0))
            self._last[name] = numbers[name]


def _family(name: str, text: str, kind: Any) -> Any:
    return pb_utils.MetricFamily(name=f"teco_kernels_{name}", description=text, kind=kind)
