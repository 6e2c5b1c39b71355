"""What a server is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes
    ----------
    model_name : str
        What clients call the model.
    api_key : str, optional
        Must come with every request but those for the page and for ``/health``.
    max_body_bytes : int
        Longest body of a request.
    max_prompt_tokens : int, optional
        Longest prompt; what the context holds when not given.
    allowed_hosts : tuple of str
        Names by which clients may address the server, ``("*",)`` for any. A server on loopback that takes any name
        could be reached by the pages that its user visits.
    body_seconds : float
        Longest time in which a body comes.
    max_connections : int
        Most connections at a time, idle ones included.
    """

    model_name: str
    api_key: str | None = None
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    body_seconds: float = 60.0
    max_connections: int = 512
