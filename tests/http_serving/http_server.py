"""The HTTP server in a thread of the tests' process, for clients over loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from teco_kernels import LLM, AsyncEngine

for _module in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(_module, reason=f"{_module} is not installed: pip install 'teco_kernels[test-serve]'")

import httpx  # noqa: E402
import uvicorn  # noqa: E402

from teco_kernels.integrations.http import Settings, create_app  # noqa: E402

KEY = "secret"
PROMPT = "The capital of France is"
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}


@contextmanager
def serving(
    llm: LLM, *, max_concurrent_requests: int = 32, limit_concurrency: int | None = None, **settings: Any
) -> Iterator[Any]:
    """A server on a free port of loopback, in a thread."""
    engine = AsyncEngine(llm, max_concurrent_requests=max_concurrent_requests)
    app = create_app(engine, Settings("tiny", **settings))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        options: dict[str, Any] = {"timeout_graceful_shutdown": 2, "limit_concurrency": limit_concurrency}
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as http:
                yield SimpleNamespace(url=url, engine=engine, llm=llm, http=http)
        finally:
            server.should_exit = True
            thread.join()


def wait_until_running(server: Any) -> None:
    """A request holds blocks."""
    deadline = time.monotonic() + 30
    while not server.engine.metrics()["kv_blocks_used"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def let_steps_take(seconds: float, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an answer is still being made when the test looks."""
    step = llm.engine.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)


def wait_until_free(server: Any) -> None:
    """No block is held within seconds: far sooner than the requests would have ended."""
    deadline = time.monotonic() + 5
    while server.engine.metrics()["requests_open"] or server.engine.metrics()["kv_blocks_used"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
