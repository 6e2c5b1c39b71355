"""The bench beside others: its protocol with fake peers, our own adapter, and what is made of the results."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]

import comparison.rounds  # noqa: E402
import teco_peer  # noqa: E402
from comparison.bars import draw  # noqa: E402
from comparison.page import document  # noqa: E402
from comparison.plan import FULL, PEERS, QUICK, Peer, Task  # noqa: E402
from comparison.results import Limits, Result, operations, shortest_time  # noqa: E402
from comparison.rounds import Setting, Team, run_task  # noqa: E402
from decode import Engine, Load, race  # noqa: E402
from problems import Attention, Matmul, problem_from, to_bfloat16  # noqa: E402
from protocol import CannotError, Session, number_of_copies  # noqa: E402

from teco_kernels.testing.machine import facts  # noqa: E402

LIMITS = Limits(memory=1e9, cache=4e9, fp32=1e10, int8=4e10)
SMALL = Matmul(64, 32, 32)
SETTING = Setting({"own": sys.executable, "peers": sys.executable, "vllm": "/nowhere/python"}, 1, 3, 1e-4)

FAKE = '''
"""A peer that multiplies with numpy, or misbehaves as its variant says."""
import os, sys
import numpy as np
from protocol import Bound, CannotError, serve

variant = sys.argv[2]
if variant == "missing":
    raise ModuleNotFoundError("No module named 'them'")

def load(problem, copies):
    if variant == "refuses":
        raise CannotError("no such kernel")
    weight = problem.dequantized()
    runs = []
    def bind(x):
        def run():
            runs.append(1)
            print("noise")
            if variant == "crashes" and len(x) == 2 and len(runs) > 4:
                os._exit(3)
            for _ in range(copies):
                bound["out"] = x @ weight
        bound = {}
        return Bound(run, lambda: bound["out"])
    return bind

serve("1.0", load, lambda problem: 4.5)
'''


def fake(variant: str) -> Peer:
    return Peer(variant, "fake", variant, "matmul")


@pytest.fixture
def _fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_peer.py").write_text(FAKE)
    monkeypatch.setattr(comparison.rounds, "SCRIPTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(BENCH / "peers"), os.environ.get("PYTHONPATH", ""))))


def measure(task: Task, peers: list[Peer]) -> dict[tuple[str, int], Result]:
    team = Team(peers, SETTING)
    try:
        return {(result.peer, result.rows): result for result in run_task(task, peers, team, SETTING)}
    finally:
        team.close()


@pytest.mark.usefixtures("_fakes")
def test_peers_that_fail_are_results_with_a_reason() -> None:
    absent = replace(fake("absent"), home="vllm")
    peers = [fake("works"), fake("refuses"), fake("missing"), fake("crashes"), absent]
    results = measure(Task(SMALL, "once", (1, 2)), peers)
    for rows in (1, 2):
        works = results["works", rows]
        assert (works.reason, len(works.seconds), works.nbytes, works.copies) == (None, 3, 1152, 1)
        assert works.error < 1e-6
        assert min(works.seconds) > 0
        assert results["refuses", rows].reason == "no such kernel"
        assert results["missing", rows].reason == "ModuleNotFoundError: No module named 'them'"
        assert results["absent", rows].reason == "/nowhere/python: No such file or directory"
    assert results["crashes", 1].seconds
    assert results["crashes", 2].reason == "ended with code 3"
    assert not results["crashes", 2].seconds


@pytest.mark.usefixtures("_fakes")
def test_a_peer_that_died_is_started_again() -> None:
    team = Team([peer := fake("crashes")], SETTING)
    try:
        for _ in range(2):
            results = list(run_task(Task(SMALL, "once", (2, 4)), [peer], team, SETTING))
            assert [result.reason for result in results] == ["ended with code 3"] * 2
        assert next(run_task(Task(SMALL, "once", (1,)), [peer], team, SETTING)).seconds
    finally:
        team.close()


@pytest.mark.parametrize("variant", ["exact", "int8"])
def test_own_products(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teco_peer, "variant", variant, raising=False)
    session = Session(teco_peer.load_matmul, teco_peer.bits_per_weight)
    request = Task(SMALL, "memory", (1,)).request(PEERS[0], 1000)
    assert session.answer(request) == {"nbytes": 1280, "copies": 4}
    for rows in (1, 3):
        assert session.answer({"bind": rows})["error"] < (1.5e-2 if variant == "int8" else 1e-5)
        assert session.answer({"run": 2})["seconds"] > 0


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 8e-3)])
def test_own_attention(dtype: str, error: float) -> None:
    session = Session(teco_peer.load_attention)
    problem = Attention(3, 64, dtype, heads=4, kv_heads=2, head_dim=16)
    peer = next(peer for peer in PEERS if peer.kind == "attention")
    assert session.answer(Task(problem, "once", (1,)).request(peer, 1000))["nbytes"] == problem.nbytes
    for rows in (1, 64):
        assert session.answer({"bind": rows})["error"] < error
        assert session.answer({"run": 1})["seconds"] > 0


def test_own_process() -> None:
    own = next(peer for peer in PEERS if peer.own)
    result = measure(Task(SMALL, "once", (1,)), [own])[own.name, 1]
    assert len(result.seconds) == SETTING.rounds


def test_attention_reference_is_plain_softmax() -> None:
    problem = Attention(1, 8, "float32", heads=2, kv_heads=1, head_dim=4)
    queries, (keys, values) = problem.inputs(8)[0], problem.keys_values()(0)
    scores = np.einsum("thd,sd->hts", queries, keys[:, 0]) / 2
    weights = np.exp(scores) * np.tril(np.ones((8, 8)))
    expected = np.einsum("hts,sd->thd", weights / weights.sum(-1, keepdims=True), values[:, 0])
    assert problem.error(8, expected[None]) < 1e-5
    assert problem.error(8, 1.1 * expected[None]) == pytest.approx(0.1, abs=1e-4)


def test_weights_are_exact_in_every_format() -> None:
    assert np.array_equal(SMALL.scales, to_bfloat16(SMALL.scales))
    assert np.array_equal(SMALL.scales, SMALL.scales.astype(np.float16))
    assert SMALL.error(2, SMALL.inputs(2).astype(np.float64) @ SMALL.dequantized()) < 1e-12


def test_number_of_copies() -> None:
    assert number_of_copies(10, 0, 100) == 1
    assert number_of_copies(10, 95, 1000) == 10
    assert number_of_copies(1000, 95, 5000) == 1
    assert number_of_copies(9, 16, 16) == 1
    with pytest.raises(CannotError, match="do not fit"):
        number_of_copies(17, 16, 16)


@pytest.mark.parametrize("task", [*FULL, *QUICK])
def test_requests_describe_their_problem(task: Task) -> None:
    for peer in PEERS:
        if peer.kind == task.problem.kind:
            request = json.loads(json.dumps(task.request(peer, 32 << 20)))
            problem = problem_from(request["prepare"])
            if isinstance(problem, Attention):
                assert problem.nbytes == task.problem.nbytes
            else:
                assert problem == task.problem


def test_limits_of_a_call() -> None:
    result = Result("", Matmul(1000, 2000, 100), "memory", 2, nbytes=1_000_000)
    assert operations(result.problem, 2) == 8_000_000
    assert shortest_time(result, LIMITS, "int8") == pytest.approx((1_000_000 + 24_000) / 1e9)
    assert shortest_time(replace(result, residence="L3"), LIMITS, "fp32") == pytest.approx(8e6 / 1e10)
    prefill = Attention(2, 4, "float32", heads=3, kv_heads=1, head_dim=5)
    assert operations(prefill, 4) == 4 * 2 * 3 * 5 * (1 + 2 + 3 + 4)
    assert operations(prefill, 1) == 4 * 2 * 3 * 5 * 4
    assert (LIMITS | Limits(2e9, 1e9, 1e9, 1e9)).memory == 2e9


def results() -> Iterator[Result]:
    for rows in (1, 16):
        problem = Matmul(4096, 4096, 128)
        for place, peer in enumerate(peer for peer in PEERS if peer.kind == "matmul"):
            seconds = [1e-2 * (1 + place) * factor for factor in (1.0, 1.1, 1.3)]
            yield Result(peer.name, problem, "memory", rows, 9_000_000, 15, 5e-3, seconds)
    yield Result("OpenVINO", Matmul(576, 1536, 32), "L3", 1, reason="it is not there")
    for dtype in ("float32", "bfloat16"):
        for peer in (peer for peer in PEERS if peer.kind == "attention"):
            yield Result(peer.name, Attention(1, 2048, dtype), "memory", 1, 8_000_000, 16, 1e-6, [2e-2])


def test_page_and_picture(tmp_path: Path) -> None:
    made = [Result.from_json(json.loads(json.dumps(result.as_json()))) for result in results()]
    assert [result.as_json() for result in made] == [result.as_json() for result in results()]
    assert made[0].median == pytest.approx(1.1e-2)
    assert made[0].quartiles == pytest.approx((1.05e-2, 1.2e-2))
    load = {"batch": 8, "prompt": 14, "tokens": 64}
    row = {"engine": "llama_cpp", "load": load, "median": None, "low": None, "high": None, "reason": "not there"}
    report = {
        "machine": facts(),
        "settings": {"quick": True, "minutes": 1.0, "date": "today", "threads": 2, "rounds": 3},
        "peers": {"OpenVINO": "1.0"},
        "end_to_end": [row, row | {"engine": "teco", "median": 927.1, "low": 900.0, "high": 950.0, "reason": None}],
    }
    page = document(report, made, LIMITS, "performance.png")
    assert "no figures to cite" in page
    assert "| teco_kernels, int8 activations | 4.292 | 5.0e-03 | **11** (10.5-12) ms, 82% |" in page
    assert "| OpenVINO |  |  | not measured: it is not there |" in page
    assert "| llama_cpp | not measured: not there |" in page
    assert "| teco | 927 (900-950) |" in page
    draw(made, LIMITS, "title", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_engines_that_do_not_start_say_why() -> None:
    engine = Engine("teco=/nowhere/python", 1)
    assert engine.reason == "/nowhere/python: No such file or directory"
    assert race([engine], [Load(1, 14, 2)], 1) == {}
    engine.close()
    assert Load(8, 512, 1).speed(2.0) == 2048
    assert Load(8, 512, 4).speed(2.0) == 16
