"""The README's code runs: Python blocks in order, the lines about a model on a small one, the others are parsed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny_models import random_model, save_model
from typer.main import get_command
from typer.testing import CliRunner

from teco_kernels.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in "".join(blocks("sh")).splitlines()]
    return [words for words in lines if words]


def test_shell_lines_are_understood() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for words in shell_lines():
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] == "teco-kernels":
            commands[words[1]].make_context(words[1], words[2:])
        else:
            assert words[:2] == ["pip", "install"]


@pytest.mark.model
def test_lines_about_a_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a model/ and a text.txt, as they suppose; calibration learns from the text of the cache."""
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    monkeypatch.setattr(
        "teco_kernels.integrations.http.serve", lambda engine, settings, **address: print(settings, address)
    )
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"), random_model(hidden_size=128, intermediate_size=128, num_hidden_layers=1))
    Path("text.txt").write_text("The capital of France is Paris.")
    lines = [words[1:] for words in shell_lines() if words[0] == "teco-kernels" and "model/" in words]
    assert [words[0] for words in lines] == ["generate", "chat", "serve", "score", "quantize", "prune"]
    for words in lines:
        result = CliRunner().invoke(app, words, input="Hello\n")
        assert result.exit_code == 0, (words, result.output, result.exception)
        assert result.stdout
    assert Path("model-4bit/model.safetensors").exists()
    assert Path("model-2to4/model.safetensors").exists()


@pytest.mark.model
def test_python_blocks_run(model_4bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["readme"])
    namespace: dict[str, object] = {"model_path": str(model_4bit)}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
