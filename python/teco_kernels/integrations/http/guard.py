"""Turns away requests of other hosts, without the key, and with bodies too long or slow, before anything reads them."""

from __future__ import annotations

import asyncio
import hmac
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teco_kernels.integrations.http.errors import ApiError
from teco_kernels.integrations.http.settings import Settings


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
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._admit(scope, receive)
        except ApiError as error:
            response = error.response(scope["path"])
            if error.status in (408, 413):
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

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request that may be answered."""
        headers = dict(scope["headers"])
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if host not in self._hosts and "*" not in self._hosts:
            expected = ", ".join(sorted(self._hosts))
            raise ApiError(403, f"Invalid Host header: expected one of {expected}, got {host!r:.100}")
        is_open = scope["path"] == "/health" or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD"))
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        is_known = kind.lower() == b"bearer" and self._key is not None and hmac.compare_digest(key.strip(), self._key)
        if not (self._key is None or is_open or is_known):
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        limit, seconds = self._settings.max_body_bytes, self._settings.body_seconds
        length = headers.get(b"content-length", b"0")
        try:
            too_long = length.isdigit() and int(length) > limit
            body = None if too_long else await asyncio.wait_for(self._read(receive, limit), seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"The body took too long: expected it within {seconds:g} s", code="body_too_slow"
            ) from None
        if body is None:
            raise ApiError(413, f"The body is too long: expected at most {limit} bytes", code="body_too_long")
        return body

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
