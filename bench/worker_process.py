"""A process that answers lines with JSON objects, and whose end, silence or refusal becomes a reason in words."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any


class WorkerError(RuntimeError):
    """The worker did not do what it was asked; the message is the reason."""


class Worker:
    """A running process with lines to and from it; its stderr is kept, for the reason if it dies.

    Parameters
    ----------
    command : sequence of str
    environment : mapping, optional
        Added to this process's own.
    timeout : float
        Seconds after which a silent worker is killed.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, timeout: float = 300
    ) -> None:
        self._timeout = timeout
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in close)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, **(environment or {})},
                text=True,
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError(f"{command[0]}: {error.strerror}") from None

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises
        ------
        WorkerError
            When it answers with a reason, dies, or says nothing for too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is dead, and reading its answer says why
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer; other lines that it prints are skipped."""
        assert self._process.stdout is not None
        silent = threading.Event()

        def give_up() -> None:
            silent.set()
            self._process.kill()

        timer = threading.Timer(self._timeout, give_up)
        timer.start()
        try:
            line = next((line for line in self._process.stdout if line.startswith("{")), None)
        finally:
            timer.cancel()
        if line is None:
            raise WorkerError(f"no answer within {self._timeout:g} s" if silent.is_set() else self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            raise WorkerError(answer["reason"])
        return answer

    def close(self) -> None:
        """Ask it to end by closing its input, and make sure of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # what could not be written to a dead process
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return lines[-1][:200] if lines and code == 1 else f"ended with code {code}"
