"""The server: its endpoints put together, and run by uvicorn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from teco_kernels import __version__
from teco_kernels.decoder.async_engine import AsyncEngine
from teco_kernels.integrations.http import errors
from teco_kernels.integrations.http.guard import Guard
from teco_kernels.integrations.http.openai import OpenAIRoutes
from teco_kernels.integrations.http.prometheus import make_registry, prometheus_text
from teco_kernels.integrations.http.settings import Settings
from teco_kernels.integrations.http.tgi import TGIRoutes

_PAGE = Path(__file__).with_name("page.html")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'"
}


def create_app(engine: AsyncEngine, settings: Settings) -> FastAPI:
    """An ASGI application over an engine, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    registry = make_registry(engine)

    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    async def metrics() -> Response:
        return Response(prometheus_text(registry), media_type=_METRICS_TYPE)

    async def kv_cache() -> dict[str, Any]:
        held = await engine.call(lambda engine: engine.held_blocks())
        numbers = engine.metrics()
        names = "kv_blocks", "kv_block_size", "kv_blocks_used", "kv_blocks_cached", "requests_running"
        return {**{name: numbers[name] for name in names}, "held": held}

    # Without a schema there are no pages of documentation, which would load scripts from elsewhere.
    app = FastAPI(title="teco_kernels", version=__version__, lifespan=lifespan, openapi_url=None)
    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)
    app.add_api_route("/kv_cache", kv_cache, methods=["GET"], response_model=None)
    app.include_router(OpenAIRoutes(engine, settings).router)
    app.include_router(TGIRoutes(engine, settings).router)
    app.add_exception_handler(errors.ApiError, errors.on_api_error)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(Exception, errors.on_any_error)
    app.add_middleware(Guard, settings=settings)
    return app


def serve(engine: AsyncEngine, settings: Settings, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until a signal comes; answers that are then open have some seconds to end."""
    app = create_app(engine, settings)
    limit = settings.max_connections + 1  # at which uvicorn begins to refuse
    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=5, limit_concurrency=limit)
