"""Finds the torch to compile against, without importing it."""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: The first version whose stable ABI holds what the operators use; the lower bound in pyproject.toml.
OLDEST = (2, 13)
_MARKER = Path("include", "torch", "csrc", "stable", "library.h")


def _candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # Under build isolation pip hides the target environment's packages from sys.path, but not from sysconfig.
    for key in ("purelib", "platlib"):
        yield Path(sysconfig.get_paths()[key], "torch")
    # Without a virtual environment, pip may have put it into the user's directory.
    if site.ENABLE_USER_SITE is not False and sys.prefix == sys.base_prefix:
        yield Path(site.getusersitepackages(), "torch")
    # uv builds in an environment of its own and tells of the target only through VIRTUAL_ENV.
    if environment := os.environ.get("VIRTUAL_ENV"):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield Path(environment, "lib", version, "site-packages", "torch")


def _is_usable(torch: Path) -> bool:
    version_file = torch / "version.py"
    if not (torch / _MARKER).exists() or not version_file.exists():
        return False
    version = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST


def find_torch() -> Path | None:
    """Directory of the installed torch package to compile against, or None when there is none or it is too old."""
    return next((path for path in _candidates() if _is_usable(path)), None)


def cuda_of(torch: Path) -> str | None:
    """The CUDA version that a torch is built for, or None for one without."""
    version = re.search(r"^cuda\b[^=]*= '([\d.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return version[1] if version else None
