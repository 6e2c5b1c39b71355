"""The README's code runs: Python blocks are executed in order, shell lines must be commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_shell_lines_name_real_commands() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    from typer.main import get_command

    from teco_kernels.cli import app

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    for line in "".join(blocks("sh")).splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:1] == ["teco-kernels"]:
            assert words[1] in commands, line
        else:
            assert words[:2] in ([], ["pip", "install"]), line


@pytest.mark.model
def test_python_blocks_run(model_4bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["readme"])
    namespace: dict[str, object] = {"model_path": str(model_4bit)}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
