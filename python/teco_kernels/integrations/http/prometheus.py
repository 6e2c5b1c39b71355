"""The engine's numbers in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from teco_kernels.decoder.async_engine import AsyncEngine
from teco_kernels.integrations.engine_numbers import COUNTERS, GAUGES

_PREFIX = "teco_kernels_"
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token",
    "time_per_output_token_seconds": "Mean of a request's tokens after the first",
    "request_seconds": "From a request's arrival to its end",
    "request_prompt_tokens": "Tokens of a request's prompt",
    "request_generated_tokens": "Tokens of a request's answers",
}


class _Collector:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        metrics = self._engine.metrics()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=metrics[name])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=metrics[name])
        finished = CounterMetricFamily(_PREFIX + "requests_finished", "Requests that have ended", labels=["reason"])
        for reason, count in metrics["requests_finished"].items():
            finished.add_metric([reason], count)
        yield finished
        for name, text in _HISTOGRAMS.items():
            histogram = self._engine.statistics.histograms[name]
            buckets = [("+Inf" if bound == float("inf") else str(bound), n) for bound, n in histogram.cumulative()]
            yield HistogramMetricFamily(_PREFIX + name, text, buckets=buckets, sum_value=histogram.sum)


def make_registry(engine: AsyncEngine) -> CollectorRegistry:
    """A registry of its own, with the engine's numbers in it."""
    registry = CollectorRegistry()
    registry.register(_Collector(engine))
    return registry


def prometheus_text(registry: CollectorRegistry) -> bytes:
    """All numbers as they are now."""
    return generate_latest(registry)
