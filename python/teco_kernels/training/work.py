"""Folders in which a training keeps what it needs to go on, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from teco_kernels.decoder.json_file import read_json, write_json
from teco_kernels.training.loop import Progress

_MANIFEST = "made_of.json"


def claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make a folder and note what it is for; ValueError when it is for something else already."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / _MANIFEST
    noted = read_json(manifest, optional=True)
    for name, value in facts.items():
        if noted and noted.get(name) != value:
            what = f"another {name}" if isinstance(value, str) else f"{name} {noted.get(name)}, not {value}"
            raise ValueError(f"{folder}: begun with {what}; remove it to begin anew")
    if not noted:
        write_json(manifest, facts)


def for_json(history: Sequence[Progress]) -> list[dict[str, Any]]:
    """The course of a training; JSON has no NaN, which the loss is before the first step."""
    return [{name: None if value != value else value for name, value in entry._asdict().items()} for entry in history]
