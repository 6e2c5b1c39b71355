"""An HTTP server over `AsyncEngine` that speaks OpenAI's and TGI's protocols; needs the extra `serve`."""

from __future__ import annotations

from teco_kernels.integrations.http.app import create_app, serve
from teco_kernels.integrations.http.settings import Settings

__all__ = ["Settings", "create_app", "serve"]
