"""PEP 517 backend: setuptools, but the torch to compile against is the one of the environment installed into.

A build requirement on torch would make every isolated build download a second torch (and, on Linux, a CUDA build of
several gigabytes). The extension needs torch's headers and libraries at build time, never a running torch, so it is
enough to know where the target environment keeps them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).resolve().parent))
from find_torch import find_torch


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [os.environ.get("TECO_BUILD_TORCH", "torch>=2.13,<2.15")]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Build requirements of a wheel: torch only when the target environment has none."""
    return _setuptools.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Build requirements of an editable install: torch only when the target environment has none."""
    return _setuptools.get_requires_for_build_editable(config_settings) + _torch_requirement()
