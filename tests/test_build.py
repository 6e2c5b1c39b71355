"""The build finds the right torch and the right compiler, wherever they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def fake_torch(root: Path, version: str) -> Path:
    torch = root / "torch"
    header = torch / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (torch / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n")
    return torch


def test_finds_the_torch_that_runs_the_tests() -> None:
    import find_torch

    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    assert find_torch.find_torch() == Path(spec.origin).parent


@pytest.mark.parametrize(
    ("version", "usable"), [("2.12.1", False), ("2.9.0", False), ("2.13.0+cpu", True), ("3.0.0", True)]
)
def test_passes_over_a_torch_that_is_too_old(
    version: str, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import find_torch

    torch = fake_torch(tmp_path, version)
    monkeypatch.setattr(find_torch, "_candidates", lambda: iter([tmp_path / "none", torch]))
    assert find_torch.find_torch() == (torch if usable else None)


def test_the_compiler_keeps_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import native_build

    monkeypatch.setenv("CXX", f"{sys.executable} -m 'some compiler'")
    assert native_build.compiler() == f"{sys.executable} -m 'some compiler'"


def test_without_a_compiler_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import native_build

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^teco_kernels: no C\+\+20 compiler found [^\n]*$"):
        native_build.compiler()


def test_paths_may_hold_spaces() -> None:
    import native_build

    ninja = native_build.NinjaFile("c++")
    ninja.compile(native_build.CSRC / "cpu" / "table.cpp", ["-I/a b/$c"])
    assert ninja.lines[-1] == "  flags = '-I/a b/$$c'"


@pytest.mark.parametrize(
    ("choice", "of_torch", "of_nvcc", "built"),
    [
        ("", "13.1", "13.0.88", True),
        ("", "12.8", "13.0.88", False),
        ("", None, "13.0.88", False),
        ("1", "12.8", "13.0.88", True),
        ("1", None, "13.0.88", True),
        ("0", "13.1", "13.0.88", False),
    ],
)
def test_cuda_kernels_are_of_the_version_that_torch_is_built_for(
    choice: str,
    of_torch: str | None,
    of_nvcc: str,
    built: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import cuda_build

    torch = fake_torch(tmp_path, "2.13.0")
    with (torch / "version.py").open("a") as file:
        file.write(f"cuda: Optional[str] = {of_torch!r}\n")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V{of_nvcc}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("TECO_CUDA", choice)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: nvcc)
    assert cuda_build.wanted_nvcc(torch) == (nvcc if built else None)
    differ = not choice and of_torch == "12.8"
    assert ("torch is built for CUDA 12.8" in capfd.readouterr().err) == differ
