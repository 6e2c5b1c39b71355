"""The command `teco-kernels`: thin functions over the library, which is imported when a command needs it."""

from __future__ import annotations

from teco_kernels.cli import machine, model, serving, training  # noqa: F401  (their commands enter `app` in this order)
from teco_kernels.cli.command import app


def main() -> None:
    """Entry point of the command."""
    app(prog_name="teco-kernels")
