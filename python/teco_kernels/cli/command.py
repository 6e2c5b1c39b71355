"""The command itself: what all its parts share, and how errors reach the user."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_INTERRUPTED = 130  # as the shell counts it: 128 + SIGINT


class UsageError(ValueError):
    """A wrong command line, found after the parser has passed it."""


class _Commands(TyperGroup):
    """Turns what a user can put right into one line on stderr, and anything else into a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("", err=True)
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            if not _is_users(error):
                raise
            report_error(error)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None


def _is_users(error: Exception) -> bool:
    """RuntimeErrors are bugs, but for those with which the registry of packages refuses a file."""
    return not isinstance(error, RuntimeError) or type(error).__name__ == "AssetError"


def report_error(error: Exception) -> None:
    """One line on stderr."""
    typer.echo(f"teco-kernels: {_one_line(error)}", err=True)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Kernels for large-language-model inference: check them, time them, and run a model on them.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from teco_kernels import __version__

        typer.echo(f"teco_kernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""


Threads = Annotated[int | None, typer.Option(min=1, help="Threads to use; as many as torch would by default.")]


def set_threads(threads: int | None) -> None:
    """Let torch, and with it the operators, use so many threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_picture(file: Path | None) -> None:
    """As `check_folders`, and ValueError when pictures cannot be drawn."""
    from importlib.util import find_spec

    if file and find_spec("matplotlib") is None:
        raise ValueError("--png: matplotlib is not installed: pip install 'teco_kernels[bench]'")
    check_folders(file)


def check_folders(*files: Path | None) -> None:
    """FileNotFoundError for a file whose folder is missing: before minutes of work, not after."""
    for file in files:
        if file and not file.parent.is_dir():
            raise FileNotFoundError(2, "No such directory", str(file.parent))
