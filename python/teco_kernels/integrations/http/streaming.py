"""Answers that last: server-sent events, and work that ends when its client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from teco_kernels.decoder.async_engine import AsyncEngine, Stream
from teco_kernels.decoder.sampling_params import RequestOutput
from teco_kernels.integrations.http.errors import as_api_error

_T = TypeVar("_T")


class Events(StreamingResponse):
    """Server-sent events of streams, which are aborted when the events end before them, as when the client goes."""

    def __init__(self, events: AsyncIterator[str], streams: Sequence[Stream]) -> None:
        self._events = events
        self._streams = streams
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self._streams:  # here, as a generator that was never begun runs no `finally` of its own
                stream.abort()
            await self._events.aclose()  # type: ignore[attr-defined]


def event(data: Any) -> str:
    """One event; JSON in ASCII, as a part of a character may come alone."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


@contextmanager
def reserved(engine: AsyncEngine, count: int) -> Iterator[list[Stream]]:
    """Places in the queue for requests that the block makes and starts; given up when it raises.

    Before the prompts are encoded: a server that has no room for them must not work on them.
    """
    streams: list[Stream] = []
    try:
        streams = engine.reserve(count)
        yield streams
    except BaseException as error:
        for stream in streams:
            stream.abort()
        if isinstance(error, Exception):
            raise as_api_error(error) from error
        raise


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs of several streams as they come, each with its stream's number; they end with it."""
    waiting = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                output = task.result()
                if not output.finished:
                    waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, output
    finally:
        for task in waiting:
            if not task.cancel() and not task.cancelled():
                task.exception()  # that of the step which has failed for all; asyncio reports what nobody has looked at
        for stream in streams:
            stream.abort()


async def finished(streams: Sequence[Stream]) -> list[RequestOutput]:
    """The finished requests, in order."""
    outputs: dict[int, RequestOutput] = {}
    try:
        async for number, output in merged(streams):
            outputs[number] = output
    except Exception as error:
        raise as_api_error(error) from error
    return [outputs[number] for number in range(len(streams))]


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T | Response:
    """Do the work, which is cancelled when the client goes; nobody reads the answer then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)
    finally:
        waiting.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working
