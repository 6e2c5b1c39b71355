"""What an interrupted run leaves behind: the layers that it has finished, for the next run of the same kind."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teco_kernels.decoder.loader import Source
from teco_kernels.quantization.gptq import GPTQTensors
from teco_kernels.quantization.report import LayerReport

#: To be raised when the quantizer gives other tensors for the same settings: nothing made before is then used again.
QUANTIZER_VERSION = 2


def fingerprint(source: Source, windows: Tensor, settings: Mapping[str, Any]) -> str:
    """Of all that decides the result: the model's files, the tokens of the calibration, the settings."""
    # Mappings among the settings are rules, and the first that matches counts.
    ordered = {name: [*value.items()] if isinstance(value, Mapping) else value for name, value in settings.items()}
    facts = [QUANTIZER_VERSION, source.raw_config, ordered, list(windows.shape)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(windows.numpy().tobytes())
    files = sorted(source.path.glob("*.safetensors")) if source.path.is_dir() else [source.path]
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """A layer of the model or its head: reports of its matrices, and their checkpoint tensors by full name."""

    reports: list[LayerReport]
    tensors: dict[str, Tensor]

    def quantised(self, name: str) -> GPTQTensors:
        """One matrix, to be dequantised."""
        bits = next(report.bits for report in self.reports if report.name == name)
        qweight, qzeros, scales, g_idx = (
            self.tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")
        )
        return GPTQTensors(qweight, qzeros, scales, g_idx, bits, len(g_idx) // len(scales))


class FinishedParts:
    """Quantised parts of a model in a folder, a file for each, complete or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, part: Part) -> None:
        """Keep a part."""
        partial = self._folder / f"{name}.partial"
        reports = json.dumps([asdict(report) for report in part.reports])
        save_file(part.tensors, partial, metadata={"reports": reports})
        os.replace(partial, self._folder / f"{name}.safetensors")

    def read(self, name: str) -> Part | None:
        """A part that was kept; None when there is none, or its file is damaged."""
        try:
            with safe_open(self._folder / f"{name}.safetensors", framework="pt") as file:
                reports = [LayerReport(**fields) for fields in json.loads(file.metadata()["reports"])]
                return Part(reports, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (FileNotFoundError, SafetensorError, ValueError, TypeError, KeyError):
            return None


@contextmanager
def unfinished(out_path: Path, key: str) -> Iterator[FinishedParts]:
    """The finished parts of the runs that make `out_path`, and that `fingerprint` gave `key`.

    They lie in a hidden folder beside it, which goes when the block is left without an exception: all of it, what
    runs with other settings left included. With an exception it stays, unless nothing is finished yet.

    Raises
    ------
    ValueError
        When another process is at it, or `out_path` exists.
    """
    folder = out_path.with_name(f".{out_path.name}.unfinished")
    finished = folder / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out_path}: another process is making it") from None
        # The process that made it may have removed the folder, lock and all, since this one opened the lock.
        if out_path.exists() or not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            raise ValueError(f"{out_path}: exists already")
        finished.mkdir(exist_ok=True)
        try:
            yield FinishedParts(finished)
        except BaseException:
            if not any(folder.rglob("*.safetensors")):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)
