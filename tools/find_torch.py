"""Finds the torch to compile against, without importing it."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_MARKER = Path("include", "torch", "csrc", "stable", "library.h")


def _candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # Under build isolation pip hides the target environment's packages from sys.path, but not from sysconfig.
    for key in ("purelib", "platlib"):
        yield Path(sysconfig.get_paths()[key], "torch")
    # uv builds in an environment of its own and tells of the target only through VIRTUAL_ENV.
    if environment := os.environ.get("VIRTUAL_ENV"):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield Path(environment, "lib", version, "site-packages", "torch")


def find_torch() -> Path | None:
    """Directory of the installed torch package that carries the stable-ABI headers, or None."""
    return next((path for path in _candidates() if (path / _MARKER).exists()), None)
