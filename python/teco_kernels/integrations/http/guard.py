"""Turns away requests without the key and with bodies that are too long, before anything looks into them."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teco_kernels.integrations.http.errors import ApiError
from teco_kernels.integrations.http.settings import Settings

_OPEN = frozenset(("/health", "/v1/health"))


class Guard:
    """ASGI middleware.

    Parameters
    ----------
    app : ASGIApp
    settings : Settings
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._expected = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_open = scope["path"] in _OPEN or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD"))
        given = headers.get(b"authorization", b"")
        if self._expected is not None and not is_open and not hmac.compare_digest(given, self._expected):
            error = ApiError(401, "Incorrect API key provided", code="invalid_api_key")
            await error.response(scope["path"])(scope, receive, send)
            return
        limit = self._settings.max_body_bytes
        length = headers.get(b"content-length", b"0")
        body = None if length.isdigit() and int(length) > limit else await self._read(receive, limit)
        if body is None:
            error = ApiError(413, f"The body is too long: expected at most {limit} bytes", code="body_too_long")
            response = error.response(scope["path"])
            response.headers["connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        is_first = True

        async def replay() -> Message:
            nonlocal is_first
            if is_first:
                is_first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, limit: int) -> bytes | None:
        """The whole body; None when it is too long."""
        parts, size = [], 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                return None
            parts.append(part)
            if not message.get("more_body", False):  # the end, or the client has gone
                return b"".join(parts)
