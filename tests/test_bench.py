"""The bench: inputs that really rotate, outputs made beforehand, and shares of ceilings that are what they say."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from teco_kernels.ops.ceilings import READ_STREAMS, fma_probe, int8_probe, read_probe
from teco_kernels.testing import Case, all_cases, bench, roofline
from teco_kernels.testing.ceilings import Ceilings

CEILINGS = Ceilings(read_bandwidth=1e9, fp32=4e9, int8=16e9)


def case_of(operator: str, **params: Any) -> Case:
    return next(
        case
        for case in all_cases()
        if case.operator == operator and all(case.params.get(key) == value for key, value in params.items())
    )


def timing_of(case: Case, seconds: float) -> bench.Timing:
    return bench.Timing(case, seconds, seconds, seconds, seconds, 5, 2, True)


def test_copies_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "l3_bytes", lambda: 1 << 20)
    calls, cold = bench._calls(case_of("gptq_matmul", rows=2, bits=4, activation="exact"))
    assert cold
    keywords = [call.keywords for call in calls if isinstance(call, partial)]
    assert len(keywords) == len(calls) > 10
    for tensor in (lambda k: k["weight"].packed, lambda k: k["weight"].bias, lambda k: k["x"], lambda k: k["out"]):
        assert len({tensor(k).data_ptr() for k in keywords}) == len(calls)
    sizes = [bench._nbytes(k) for k in keywords]
    assert sum(sizes) >= 4 << 20
    assert sizes[0] >= keywords[0]["weight"].packed.nbytes + keywords[0]["out"].nbytes


def test_copies_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("rms_norm", tokens=3)
    assert len(bench._calls(case)[0]) == bench._MAX_COPIES
    monkeypatch.setattr(bench, "_MEMORY", 1)
    calls, cold = bench._calls(case)
    assert len(calls) == 1
    assert not cold


@pytest.mark.parametrize("operator", ["rms_norm", "fused_add_rms_norm", "dense_matmul", "sample"])
def test_outputs_are_made_beforehand(operator: str) -> None:
    case = next(case for case in all_cases() if case.operator == operator)
    inputs = case.inputs()
    inputs |= bench._outputs(case, inputs)
    result = case.function(**inputs)
    for out, returned in zip(
        inputs["out"] if isinstance(inputs["out"], tuple) else (inputs["out"],),
        result if isinstance(result, tuple) else (result,),
        strict=True,
    ):
        assert out.data_ptr() == returned.data_ptr()


def test_timing_takes_about_the_time_it_is_given() -> None:
    start = time.perf_counter()
    timing = bench.time_case(case_of("rms_norm", tokens=3), seconds=0.05)
    assert time.perf_counter() - start < 5
    assert bench._MIN_SAMPLES <= timing.samples <= bench._MAX_SAMPLES
    assert 0 < timing.best <= timing.quartile_low <= timing.seconds <= timing.quartile_high


def test_share_is_of_the_slower_of_memory_and_arithmetic() -> None:
    few, many = (case_of("dense_matmul", rows=rows, in_features=4096) for rows in (1, 512))
    by_memory = timing_of(few, 2 * few.bytes_moved / CEILINGS.read_bandwidth)
    assert by_memory.bound(CEILINGS) == "memory"
    assert by_memory.share(CEILINGS) == pytest.approx(0.5)
    by_arithmetic = timing_of(many, 4 * many.flops / CEILINGS.fp32)
    assert by_arithmetic.bound(CEILINGS) == "arithmetic"
    assert by_arithmetic.share(CEILINGS) == pytest.approx(0.25)
    integer = case_of("gptq_matmul", rows=512, activation="int8")
    assert timing_of(integer, integer.flops / CEILINGS.int8).share(CEILINGS) == pytest.approx(1)


def test_the_best_measurement_of_each_ceiling_is_kept() -> None:
    assert CEILINGS | Ceilings(2e9, 1e9, 1e9) == Ceilings(2e9, 4e9, 16e9)


def test_probes_count_what_they_do() -> None:
    for probe in (fma_probe, int8_probe):
        assert probe(200) == 2 * probe(100) > 0
    data = torch.ones(1000)
    for streams in READ_STREAMS:
        read_probe(data, streams)
    with pytest.raises(ValueError, match=r"num_streams: expected 1, 2, 4 or 8, got 3"):
        read_probe(data, 3)


def test_probes_take_time_in_proportion() -> None:
    def seconds(iterations: int) -> float:
        times = []
        for _ in range(5):
            start = time.thread_time()
            fma_probe(iterations)
            times.append(time.thread_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert 5 < seconds(400_000) / seconds(40_000) < 20
    finally:
        torch.set_num_threads(threads)


def test_roofline_draws_cases_without_arithmetic(tmp_path: Path) -> None:
    cases = [case for case in all_cases() if case.benchmark]
    for name, some in (("all", cases), ("none", [case for case in cases if not case.flops][:1])):
        file = tmp_path / f"{name}.png"
        roofline.draw([timing_of(case, 1e-3) for case in some], CEILINGS, "a machine", file)
        assert file.stat().st_size > 10_000


def test_summary_is_short() -> None:
    case = case_of("gptq_matmul", rows=1, activation="int8", in_features=4096)
    assert case.summary == "fp32, rows 1, int8, 4096 to 4096, 4-bit, group 128"
