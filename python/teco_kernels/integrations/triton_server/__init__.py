"""Models for Triton Inference Server's Python backend: a repository is written here, and its models are served.

`model` runs in the server's process, which alone has the modules that it needs.
"""

from __future__ import annotations

from teco_kernels.integrations.triton_server.launch import run_server, server_command
from teco_kernels.integrations.triton_server.repository import add_model

__all__ = ["add_model", "run_server", "server_command"]
