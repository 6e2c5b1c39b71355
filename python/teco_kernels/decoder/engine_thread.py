"""The thread that owns an engine: steps it while there are requests, and carries their outputs to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

import torch

from teco_kernels.decoder.engine import Engine
from teco_kernels.decoder.request_statistics import RequestStatistics
from teco_kernels.decoder.sampling_params import RequestOutput, SamplingParams
from teco_kernels.parallel.communicator import CommunicatorError

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class QueueFullError(RuntimeError):
    """There are as many unfinished requests as are allowed."""


class EngineClosedError(RuntimeError):
    """The engine has been closed, or has failed for good; `__cause__` says why."""


class StepError(RuntimeError):
    """The step that computed a request failed, and the request with it; `__cause__` says why."""


class Mailbox:
    """What a request has come to since its consumer last looked.

    A slow consumer gets less often more: outputs that it has not taken are merged, so that they take no more memory
    than one.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The consumer's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.arrival_time = time.monotonic()
        self.is_open = True  # counts as a request; written under the thread's lock
        self.has_begun = False  # has had tokens
        self._loop = loop
        self._lock = threading.Lock()
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._ready = asyncio.Event()

    def put(self, content: RequestOutput | Exception) -> bool:
        """Leave something for the consumer, from any thread; False when its loop is gone."""
        with self._lock:
            was_empty = self._output is None and self._error is None
            if isinstance(content, Exception):
                self._error = content
            else:
                if self._output is not None:
                    for answer, earlier in zip(content.outputs, self._output.outputs, strict=True):
                        answer.new_text = earlier.new_text + answer.new_text
                self._output = content
        if was_empty:
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop is closed
                return False
        return True

    async def get(self) -> RequestOutput:
        """Wait for the next output; an error is raised once the outputs before it are taken."""
        await self._ready.wait()
        with self._lock:
            output, self._output = self._output, None
            if output is None:
                assert self._error is not None
                raise self._error
            if self._error is None:
                self._ready.clear()
            return output


class NewRequest(NamedTuple):
    """A request to be taken in; `prompt` is its text, if it had one."""

    request_id: str
    token_ids: Sequence[int]
    prompt: str | None
    mailbox: Mailbox


class EngineThread(threading.Thread):
    """Runs an engine, which no other thread may touch meanwhile.

    Parameters
    ----------
    engine : Engine
    max_concurrent_requests : int
        Most requests that are open at a time.

    Attributes
    ----------
    num_open : int
        Requests that have been taken in and not ended.
    failure : Exception or None
        What has ended the engine for good.
    """

    def __init__(self, engine: Engine, max_concurrent_requests: int) -> None:
        super().__init__(name="teco_kernels engine", daemon=True)
        self.engine = engine
        self.max_concurrent_requests = max_concurrent_requests
        self.num_open = 0
        self.failure: Exception | None = None
        self.statistics = RequestStatistics()
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: stop
        self._is_closed = False
        # Reentrant: a stream may be collected, and send its abort, while this thread of control holds it.
        self._lock = threading.RLock()
        self._mailboxes: dict[str, Mailbox] = {}

    # Called from any thread.

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        """Have a function called between two steps, after those submitted before it.

        Raises
        ------
        EngineClosedError
        """
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            self._check_open()
            self._inbox.put(run)
        return future

    def open_mailboxes(self, loop: asyncio.AbstractEventLoop, count: int) -> list[Mailbox]:
        """Count so many requests in, or none of them.

        Raises
        ------
        QueueFullError, EngineClosedError
        """
        with self._lock:
            self._check_open()
            if self.num_open + count > self.max_concurrent_requests:
                self.statistics.refused += count
                raise QueueFullError(
                    f"expected at most {self.max_concurrent_requests} requests at a time (max_concurrent_requests)"
                )
            self.num_open += count
        return [Mailbox(loop) for _ in range(count)]

    def stop(self) -> None:
        """End the thread after the step that it is in; requests that are open get an EngineClosedError."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put(None)
        if self is not threading.current_thread():
            self.join()

    def _check_open(self) -> None:
        if self._is_closed:
            reason = "was closed" if self.failure is None else f"has failed: {self.failure}"
            raise EngineClosedError(f"the engine {reason}") from self.failure

    # Called in this thread, by `submit`.

    def add(self, requests: Sequence[NewRequest], params: SamplingParams) -> None:
        """Take in requests, or none of them; see `Engine.add_request`."""
        added: list[str] = []
        try:
            for request_id, token_ids, prompt, mailbox in requests:
                self.engine.add_request(request_id, token_ids, params, prompt)
                self._mailboxes[request_id] = mailbox
                added.append(request_id)
        except Exception:
            for request_id in added:
                self.engine.abort_request(request_id)
                del self._mailboxes[request_id]
            raise

    def abort(self, request_id: str) -> None:
        """End a request, and tell its consumer."""
        if mailbox := self._mailboxes.get(request_id):
            output = self._drop(request_id, mailbox)
            if output is not None:
                mailbox.put(output)

    def abandon(self, request_id: str, mailbox: Mailbox) -> None:
        """End a request whose consumer has gone; it may never have been taken in."""
        self._drop(request_id, mailbox)

    def _drop(self, request_id: str, mailbox: Mailbox, reason: str = "abort") -> RequestOutput | None:
        output = None
        if self._mailboxes.get(request_id) is mailbox:  # else the name is that of another request
            output = self.engine.abort_request(request_id, reason)
            if output is not None:
                self.statistics.end(output, mailbox.arrival_time)
        self._close(request_id, mailbox)
        return output

    def _close(self, request_id: str, mailbox: Mailbox) -> None:
        if self._mailboxes.get(request_id) is mailbox:
            del self._mailboxes[request_id]
        with self._lock:
            self.num_open -= mailbox.is_open
            mailbox.is_open = False

    # The thread itself.

    @torch.inference_mode()
    def run(self) -> None:
        """Step as long as there are requests; wait for commands when there are none."""
        try:
            while self._take_commands():
                if self.engine.has_unfinished_requests:
                    self._step()
        except Exception as error:
            _logger.exception("the engine has failed, and answers no more requests")
            self.failure = error
        with self._lock:
            self._is_closed = True
        while not self._inbox.empty():  # what has been submitted since; requests among it end like the others
            self._take_command(wait=False)
        self._end_all(EngineClosedError, "the engine was closed" if self.failure is None else "the engine has failed")

    def _take_commands(self) -> bool:
        """Run the commands that are there, after waiting for one when there is nothing else to do; False: stop."""
        going_on = self._take_command(wait=not self.engine.has_unfinished_requests)
        for _ in range(self._inbox.qsize()):
            going_on = going_on and self._take_command(wait=False)
        return going_on

    def _take_command(self, *, wait: bool) -> bool:
        try:
            command = self._inbox.get(block=wait)
        except Empty:
            return True
        if command is None:
            return False
        command()
        return True

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except CommunicatorError:
            raise
        except Exception as error:
            _logger.exception("a step failed, and with it all requests that were open")
            self._end_all(StepError, f"the step failed: {type(error).__name__}: {error}", error)
            return
        self._deliver(outputs)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is None:  # a request from before this thread had the engine
                continue
            if not mailbox.has_begun:
                mailbox.has_begun = True
                self.statistics.begin(output, mailbox.arrival_time)
            if output.finished:
                self.statistics.end(output, mailbox.arrival_time)
                self._close(output.request_id, mailbox)
            if not mailbox.put(output):
                self.abandon(output.request_id, mailbox)

    def _end_all(self, kind: type[RuntimeError], message: str, cause: Exception | None = None) -> None:
        cause = cause or self.failure
        for request_id, mailbox in list(self._mailboxes.items()):
            try:
                self._drop(request_id, mailbox, "abort" if cause is None else "error")
            except Exception:
                if not self._is_closed:
                    raise
                _logger.exception("request %r could not be taken out of an engine that has failed", request_id)
            error = kind(message)
            error.__cause__ = cause
            mailbox.put(error)
