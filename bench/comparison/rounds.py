"""Runs the peers in turns: whatever else the machine does meanwhile hits all of them alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from worker_process import Worker, WorkerError

from comparison.plan import Peer, Task
from comparison.results import Limits, Result
from teco_kernels.ops.ceilings import READ_STREAMS, read_probe
from teco_kernels.testing.ceilings import Prober
from teco_kernels.testing.machine import l3_bytes

SCRIPTS = Path(__file__).resolve().parents[1] / "peers"


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes
    ----------
    pythons : dict
        Interpreter of each `Peer.home`.
    threads, rounds : int
    seconds : float
        Of one run, about: a run repeats short calls.
    """

    pythons: dict[str, str]
    threads: int
    rounds: int
    seconds: float


class Team:
    """Processes of peers. One that cannot be started is not tried again; one that dies is, for the next task."""

    def __init__(self, peers: list[Peer], setting: Setting) -> None:
        self._setting = setting
        self._workers: dict[str, Worker] = {}
        self.descriptions: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        for peer in peers:  # all of them first: what takes long at the start is importing
            self._try(peer, partial(self._spawn, peer))
        for peer in peers:
            self._try(peer, partial(self._greet, peer))

    def ask(self, peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request; WorkerError with the reason when there is no answer."""
        if peer.name in self.reasons:
            raise WorkerError(self.reasons[peer.name])
        if not self.alive(peer):
            if peer.name in self._workers:
                self._workers.pop(peer.name).close()
            self._spawn(peer)
            self._greet(peer)
        return self._workers[peer.name].ask(json.dumps(request))

    def alive(self, peer: Peer) -> bool:
        """Whether its process still runs, with all that it has prepared."""
        return peer.name in self._workers and self._workers[peer.name].alive

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def _try(self, peer: Peer, step: Callable[[], None]) -> None:
        if peer.name in self.reasons:
            return
        try:
            step()
        except WorkerError as error:
            self.reasons[peer.name] = str(error)

    def _spawn(self, peer: Peer) -> None:
        threads = str(self._setting.threads)
        environment = {"OMP_NUM_THREADS": threads, **({"OMP_PROC_BIND": "true"} if peer.openmp else {})}
        command = [self._setting.pythons[peer.home], str(SCRIPTS / f"{peer.script}_peer.py"), threads, peer.variant]
        self._workers[peer.name] = Worker(command, environment)

    def _greet(self, peer: Peer) -> None:
        self.descriptions[peer.name] = str(self._workers[peer.name].answer()["description"])


class LimitProber:
    """Measures the machine's limits, again and again between the tasks."""

    def __init__(self) -> None:
        self._prober = Prober()
        self._cached = torch.ones(l3_bytes() // 2 // 4)

    def measure(self, seconds: float) -> Limits:
        ceilings = self._prober.measure(seconds)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            for streams in READ_STREAMS:
                start = time.perf_counter()
                read_probe(self._cached, streams)
                best = min(best, time.perf_counter() - start)
        return Limits(ceilings.read_bandwidth, self._cached.nbytes / best, ceilings.fp32, ceilings.int8)


def run_task(
    task: Task, peers: list[Peer], team: Team, setting: Setting, advance: Callable[[], object] = lambda: None
) -> Iterator[Result]:
    """Time a task's peers in turns; one result per peer and number of rows, with a reason where there is no time.

    `advance` is called once per peer, number of rows and round.
    """
    prepared: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for peer in peers:
        try:
            prepared[peer.name] = team.ask(peer, task.request(peer, l3_bytes()))
        except WorkerError as error:
            failures[peer.name] = str(error)
    for rows in task.rows:
        results = {peer.name: Result(peer.name, task.problem, task.residence, rows) for peer in peers}
        passes: dict[str, int] = {}

        def failed(peer: Peer, error: WorkerError, results: dict[str, Result] = results) -> None:
            results[peer.name].reason = str(error)
            results[peer.name].seconds.clear()
            if not team.alive(peer):
                failures[peer.name] = str(error)  # its operand is gone, too

        for peer in peers:
            result = results[peer.name]
            if peer.name in failures:
                result.reason = failures[peer.name]
                continue
            result.nbytes, result.copies = prepared[peer.name]["nbytes"], prepared[peer.name]["copies"]
            try:
                result.error = team.ask(peer, {"bind": rows})["error"]
                first = team.ask(peer, {"run": 1})["seconds"] * result.copies
                passes[peer.name] = max(1, round(setting.seconds / max(first, 1e-7)))
            except WorkerError as error:
                failed(peer, error)
        for index in range(setting.rounds):
            first = index % len(peers)
            for peer in peers[first:] + peers[:first]:
                if results[peer.name].reason is None:
                    try:
                        answer = team.ask(peer, {"run": passes[peer.name]})
                        results[peer.name].seconds.append(answer["seconds"])
                    except WorkerError as error:
                        failed(peer, error)
                advance()
        yield from results.values()
