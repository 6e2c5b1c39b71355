"""`AsyncEngine`: requests that come and go from an event loop, over one `LLM`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, TypeVar

from teco_kernels.decoder.engine import Engine
from teco_kernels.decoder.engine_thread import EngineClosedError, EngineThread, Mailbox, NewRequest
from teco_kernels.decoder.llm import LLM, Prompt, unwrapped
from teco_kernels.decoder.request_statistics import RequestStatistics
from teco_kernels.decoder.sampling_params import RequestError, RequestOutput, SamplingParams

_T = TypeVar("_T")


class AsyncEngine:
    """Answers requests of an event loop, batched continuously; one thread of its own computes them.

    Parameters
    ----------
    llm : LLM
        Not to be used otherwise until the engine is closed. Closing it remains the caller's.
    max_concurrent_requests : int
        Most requests that are open, running or waiting, at a time; `add` refuses others.

    Examples
    --------
    >>> async with AsyncEngine(LLM("model/")) as engine:
    ...     async for output in await engine.add("The capital of France is", SamplingParams(temperature=0)):
    ...         print(output.outputs[0].new_text, end="")
     Paris.
    """

    def __init__(self, llm: LLM, *, max_concurrent_requests: int = 128) -> None:
        if type(max_concurrent_requests) is not int or max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests: expected a positive integer, got {max_concurrent_requests!r}")
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self.max_concurrent_requests = max_concurrent_requests
        self._ids = count()
        self._thread = EngineThread(llm.engine, max_concurrent_requests)
        self._thread.start()
        # Also when this is collected, and at exit: the thread must not be in a kernel when Python goes.
        self._end = weakref.finalize(self, self._thread.stop)

    async def add(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Stream:
        """Take in a request.

        Parameters
        ----------
        prompt : str, list of int, or one of vLLM's dictionaries
        sampling_params : SamplingParams, optional
        request_id : str, optional
            A name that no other open request has, for `abort`.

        Returns
        -------
        Stream
            Its outputs.

        Raises
        ------
        ValueError, TypeError
            The request can never be answered.
        QueueFullError
            `max_concurrent_requests` are open.
        EngineClosedError
        """
        if request_id is None:
            request_id = f"request-{next(self._ids)}"
        streams = self._open([request_id])
        await self.start(streams, [prompt], sampling_params)
        return streams[0]

    def reserve(self, count: int = 1) -> list[Stream]:
        """Open requests whose prompts are still to be made: all of them, or none.

        Returns
        -------
        list of Stream
            To be given to `start`, or aborted. They count as requests until then.

        Raises
        ------
        QueueFullError, EngineClosedError
        """
        return self._open([f"request-{next(self._ids)}" for _ in range(count)])

    def _open(self, request_ids: Sequence[str]) -> list[Stream]:
        mailboxes = self._thread.open_mailboxes(asyncio.get_running_loop(), len(request_ids))
        return [Stream(self, self._thread, *place) for place in zip(request_ids, mailboxes, strict=True)]

    async def start(
        self, streams: Sequence[Stream], prompts: Sequence[Prompt], sampling_params: SamplingParams | None = None
    ) -> None:
        """Take in requests that are open, between the same two steps: all of them, or none.

        When it raises, which it does as `add`, they are aborted.
        """
        try:
            requests = []
            for stream, prompt in zip(streams, prompts, strict=True):
                plain = unwrapped(prompt)
                if isinstance(plain, str):
                    requests.append(stream.request(await self.encode(plain), plain))
                else:
                    requests.append(stream.request(plain, None))
            params = sampling_params or SamplingParams()
            await asyncio.wrap_future(self._thread.submit(partial(self._thread.add, requests, params)))
        except BaseException:
            for stream in streams:
                stream.abort()
            raise

    async def abort(self, request_id: str) -> None:
        """End a request; its blocks are free on return, and its stream ends with finish reason "abort".

        Unknown and finished ones are ignored.
        """
        await asyncio.wrap_future(self._thread.submit(partial(self._thread.abort, request_id)))

    async def call(self, function: Callable[[Engine], _T]) -> _T:
        """Call a function on the engine, between two steps."""
        return await asyncio.wrap_future(self._thread.submit(partial(function, self._thread.engine)))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; a long one does not hold up the loop."""
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def metrics(self) -> dict[str, Any]:
        """Those of `Engine.metrics`, and numbers about requests.

        ``requests_open`` are running, waiting, or about to be taken in; ``requests_refused`` found the queue full;
        ``requests_finished`` is by finish reason. Of each histogram of `statistics` there are ``<name>_sum`` and
        ``<name>_count``.
        """
        numbers = self._thread.engine.metrics()
        numbers |= {
            "requests_open": self._thread.num_open,
            "max_concurrent_requests": self.max_concurrent_requests,
            "requests_refused": self.statistics.refused,
            "requests_finished": dict(self.statistics.finished),
        }
        for name, histogram in self.statistics.histograms.items():
            numbers |= {f"{name}_sum": histogram.sum, f"{name}_count": histogram.count}
        return numbers

    @property
    def statistics(self) -> RequestStatistics:
        """Durations and sizes of requests; to be read only."""
        return self._thread.statistics

    @property
    def failure(self) -> Exception | None:
        """Why no request can be answered any more; None as long as they can."""
        return self._thread.failure

    async def close(self) -> None:
        """End the thread. Streams that are open get an EngineClosedError, and later calls raise it."""
        await asyncio.to_thread(self._end)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Stream:
    """The outputs of a request, as an asynchronous iterator.

    Each is the answer so far; `CompletionOutput.new_text` is what came since the one before. A consumer that is slower
    than the engine gets several steps in one. The request is aborted when the consumer is cancelled while it waits,
    leaves the ``async with`` of the stream, or drops it.

    Raises
    ------
    RequestError
        The request failed.
    StepError
        The step that computed it failed.
    EngineClosedError
    """

    def __init__(self, engine: AsyncEngine, thread: EngineThread, request_id: str, mailbox: Mailbox) -> None:
        self.request_id = request_id
        self._engine = engine  # which must not be collected, and closed, before its streams
        self._thread = thread
        self._mailbox = mailbox
        self._is_done = False

    def request(self, token_ids: Sequence[int], prompt: str | None) -> NewRequest:
        """The request of this stream, for the engine's thread."""
        return NewRequest(self.request_id, token_ids, prompt, self._mailbox)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_done:
            raise StopAsyncIteration
        try:
            output = await self._mailbox.get()
        except BaseException:
            self.abort()
            raise
        self._is_done = output.finished
        if error := next((answer.error for answer in output.outputs if answer.error), None):
            raise RequestError(error, [output])
        return output

    async def last(self) -> RequestOutput:
        """Read on to the end; returns the finished request."""
        output = await anext(self)
        while not output.finished:
            output = await anext(self)
        return output

    def abort(self) -> Future[None] | None:
        """End the request if it has not ended; what comes back is done when its blocks are free."""
        if self._is_done:
            return None
        self._is_done = True
        with suppress(EngineClosedError):  # which has ended all requests
            return self._thread.submit(partial(self._thread.abandon, self.request_id, self._mailbox))
        return None

    async def aclose(self) -> None:
        """End the request if it has not ended; its blocks are free on return."""
        if aborted := self.abort():
            await asyncio.wrap_future(aborted)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self.abort()
