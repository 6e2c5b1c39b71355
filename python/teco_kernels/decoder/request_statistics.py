"""What a server wants to know of the requests that it answered, as plain numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from teco_kernels.decoder.sampling_params import RequestOutput

_SECONDS = 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0
_TOKENS = 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0


class Histogram:
    """Counts of values by upper bounds, as Prometheus has them.

    Parameters
    ----------
    bounds : tuple of float
        Upper bounds of the buckets, rising; one without a bound follows the last.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Note a value; one that equals a bound lies below it."""
        self.sum += value
        self._counts[bisect_left(self.bounds, value)] += 1

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(self._counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """``(bound, values up to it)`` of every bucket, the last one's bound being infinity."""
        return list(zip((*self.bounds, float("inf")), accumulate(self._counts), strict=True))


class RequestStatistics:
    """Numbers and durations of requests, written by the thread that steps the engine.

    Attributes
    ----------
    histograms : dict of str to Histogram
        ``time_to_first_token_seconds`` from a request's arrival, ``time_per_output_token_seconds`` its mean over the
        tokens after the first (of all its answers together), ``request_seconds`` from arrival to end,
        ``request_prompt_tokens`` and ``request_generated_tokens``.
    finished : Counter of str
        Requests that have ended by finish reason: that of their first answer.
    refused : int
        Requests that were turned away as there were too many; written by callers, under their lock.
    """

    def __init__(self) -> None:
        self.histograms = {
            "time_to_first_token_seconds": Histogram(_SECONDS),
            "time_per_output_token_seconds": Histogram(_SECONDS),
            "request_seconds": Histogram(_SECONDS),
            "request_prompt_tokens": Histogram(_TOKENS),
            "request_generated_tokens": Histogram(_TOKENS),
        }
        self.finished: Counter[str] = Counter()
        self.refused = 0

    def begin(self, output: RequestOutput, arrival_time: float) -> None:
        """Note a request's first tokens."""
        if output.metrics.first_token_time is not None:
            seconds = output.metrics.first_token_time - arrival_time
            self.histograms["time_to_first_token_seconds"].add(seconds)

    def end(self, output: RequestOutput, arrival_time: float) -> None:
        """Note a request's end."""
        self.finished[output.outputs[0].finish_reason or "abort"] += 1
        first, last = output.metrics.first_token_time, output.metrics.finished_time
        num_generated = sum(len(answer.token_ids) for answer in output.outputs)
        self.histograms["request_prompt_tokens"].add(len(output.prompt_token_ids))
        self.histograms["request_generated_tokens"].add(num_generated)
        if last is not None:
            self.histograms["request_seconds"].add(last - arrival_time)
            if first is not None and num_generated > 1:
                self.histograms["time_per_output_token_seconds"].add((last - first) / (num_generated - 1))
