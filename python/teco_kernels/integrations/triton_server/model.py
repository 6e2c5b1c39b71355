"""The model that Triton Inference Server's Python backend runs: its requests over one `AsyncEngine`."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import triton_python_backend_utils as pb_utils  # which only the backend's process has

from teco_kernels.decoder.async_engine import AsyncEngine
from teco_kernels.decoder.engine_thread import EngineClosedError, QueueFullError
from teco_kernels.decoder.llm import LLM
from teco_kernels.decoder.sampling_params import RequestError
from teco_kernels.integrations.triton_server.metrics import EngineMetrics
from teco_kernels.integrations.triton_server.protocol import Generation, ResponseWriter, read_request
from teco_kernels.integrations.triton_server.repository import read_options

_logger = logging.getLogger(__name__)
# Seconds between two looks at who has gone; the server does not tell by itself.
_CANCEL_INTERVAL = 0.05
_LOOKS_PER_REPORT = 10


class TritonPythonModel:
    """Called by the backend, in the one thread that it has for it.

    An event loop in a thread of its own answers the requests. It alone sends responses and asks whether they are still
    wanted, which the backend allows until the last response of a request and not after it. While the loop is held up by
    sending, what the engine adds to its streams is merged.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; an error is the server's reason not to."""
        config = json.loads(args["model_config"])
        self._is_decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        path, options = read_options(config["parameters"])
        limits = {key: options.pop(key) for key in ("max_concurrent_requests",) if key in options}
        self._llm = LLM(path, **options)
        self._engine = AsyncEngine(self._llm, **limits)
        self._metrics = EngineMetrics(self._engine, {"model": args["model_name"], "version": args["model_version"]})
        self._metrics.report()
        self._senders: dict[asyncio.Task[None], Any] = {}  # of requests that have not had their last response
        self._loop = asyncio.new_event_loop()
        self._arrival = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teco_kernels responses", daemon=True)
        self._thread.start()
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take in requests; their responses come later."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                # Now: the memory of the tensors is the server's again when this returns.
                tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                generation = read_request(tensors, json.loads(request.parameters() or "{}"))
                if generation.stream and not self._is_decoupled:
                    raise ValueError("stream: expected false, or a model that is decoupled; got true")
            except Exception as error:
                _send_error(sender, error)
                continue
            self._loop.call_soon_threadsafe(self._start, generation, sender)

    def finalize(self) -> None:
        """End what is open, and the threads."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._llm.close()

    # In the loop's thread.

    def _start(self, generation: Generation, sender: Any) -> None:
        task = self._loop.create_task(self._answer(generation, sender))
        self._senders[task] = sender
        task.add_done_callback(self._end)
        self._arrival.set()

    def _end(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step has sent nothing."""
        sender = self._senders.pop(task, None)
        if sender is not None:
            _send_error(sender, asyncio.CancelledError())

    async def _answer(self, generation: Generation, sender: Any) -> None:
        """Send all responses of a request."""
        task = asyncio.current_task()
        assert task is not None
        try:
            async with await self._engine.add(generation.prompt, generation.params) as stream:
                writer: ResponseWriter | None = None
                async for output in stream:
                    writer = writer or ResponseWriter(generation, self._text(generation))
                    if output.finished:
                        del self._senders[task]
                    if writer.has_news(output):
                        _send(sender, writer.tensors(output), is_last=output.finished)
        except (Exception, asyncio.CancelledError) as error:
            if self._senders.pop(task, None) is None:
                raise  # it was the last response that failed
            _send_error(sender, error)

    def _text(self, generation: Generation) -> str:
        prompt = generation.prompt
        return prompt if isinstance(prompt, str) else self._engine.tokenizer.decode(prompt)

    async def _watch(self) -> None:
        """End requests that are cancelled, and report numbers, as long as there are requests."""
        while True:
            await self._arrival.wait()
            self._arrival.clear()
            looks = 0
            while self._senders:
                await self._look()
                looks += 1
                if looks % _LOOKS_PER_REPORT == 0:
                    self._report()
                await asyncio.sleep(_CANCEL_INTERVAL)
            with suppress(EngineClosedError):
                await self._engine.call(lambda engine: None)  # so that blocks of cancelled requests are free
            self._report()

    async def _look(self) -> None:
        for task, sender in list(self._senders.items()):
            try:
                if task in self._senders and sender.is_cancelled():
                    task.cancel()
            except Exception:
                _logger.exception("the server does not tell whether a request is cancelled")
            await asyncio.sleep(0)

    def _report(self) -> None:
        try:
            self._metrics.report()
        except Exception:
            _logger.exception("the server does not take numbers")

    async def _close(self) -> None:
        self._watching.cancel()
        await self._engine.close()
        await asyncio.gather(*self._senders, return_exceptions=True)


def _send(sender: Any, tensors: dict[str, Any], *, is_last: bool) -> None:
    response = pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in tensors.items()])
    sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)


def _send_error(sender: Any, error: BaseException) -> None:
    """As the last response."""
    kinds = pb_utils.TritonError
    message, kind = str(error), kinds.INTERNAL
    if isinstance(error, asyncio.CancelledError):
        message, kind = "the request was cancelled", kinds.CANCELLED
    elif isinstance(error, (QueueFullError, EngineClosedError)):
        kind = kinds.UNAVAILABLE
    elif isinstance(error, (ValueError, TypeError)) and not isinstance(error, RequestError):
        kind = kinds.INVALID_ARG
    response = pb_utils.InferenceResponse([], pb_utils.TritonError(message, kind))
    sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
