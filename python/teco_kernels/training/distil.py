"""From a model to a recycle head beside it: record, train, save."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from teco_kernels import __version__
from teco_kernels.assets import exclusive
from teco_kernels.decoder.llm import LLM
from teco_kernels.decoder.loader import load_source
from teco_kernels.quantization.unfinished import fingerprint
from teco_kernels.training.acceptance import Acceptance, acceptance
from teco_kernels.training.head import Base
from teco_kernels.training.loop import Progress
from teco_kernels.training.prompts import Part
from teco_kernels.training.recording import Recording, record_part
from teco_kernels.training.save import check_bits, quantise_head, save_recycle_head
from teco_kernels.training.trainer import Trainer, TrainingSettings
from teco_kernels.training.work import claim, for_json

_MAX_MODEL_LEN, _MAX_NUM_SEQS, _CACHE_MEMORY = 1024, 96, 4 << 30


def train_recycle(
    model: str | Path,
    out: str | Path,
    settings: TrainingSettings | None = None,
    *,
    num_tokens: int = 1_000_000,
    num_validation_tokens: int = 40_000,
    max_new_tokens: int = 192,
    recording: str | Path | None = None,
    said_vocab_size: int = 4096,
    bits: int | None = 4,
    use_tqdm: bool = True,
) -> tuple[list[Progress], Acceptance]:
    """Distil a recycle head for a model and save it in a folder of its own.

    Interrupted, the same call goes on where it was: recordings and the last checkpoint lie in a hidden folder beside
    `out` until that is complete.

    Parameters
    ----------
    model : str or Path
        The base model, quantised as it will be used.
    out : str or Path
        The folder to make.
    settings : TrainingSettings, optional
    num_tokens, num_validation_tokens : int
        To record, prompts included.
    max_new_tokens : int
        Most tokens with which a prompt is continued.
    recording : str or Path, optional
        Where to keep the recording, for other trainings; one that is there is used, and made longer when it is short.
    said_vocab_size : int
        Tokens that the saved head says: the most frequent ones of those that it is trained with; 0 for all of them.
    bits : {2, 3, 4, 8}, optional
        Of the saved head's matrices, quantised with GPTQ on recorded texts. None: fp16.

    Returns
    -------
    list of Progress
        The course of the training.
    Acceptance
        Of the saved head, on the texts for validation.

    Raises
    ------
    ValueError
        When `out` exists, or what an earlier run has left belongs to another model or other settings.
    """
    out, settings = Path(out), settings or TrainingSettings()
    for name, value in (("num_tokens", num_tokens), ("num_validation_tokens", num_validation_tokens)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if said_vocab_size < 0:
        raise ValueError(f"said_vocab_size: expected 0 or more, got {said_vocab_size}")
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens: expected 2 or more, got {max_new_tokens}")
    source = load_source(model)
    base = Base(source)
    check_bits(settings.head_config(base.config), bits)  # both say what is wrong before hours of work
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if out.exists():
            raise ValueError(f"{out}: exists already")
        work = out.with_name(f".{out.name}.unfinished")
        work.mkdir(exist_ok=True)
        folder = work / "recording" if recording is None else Path(recording)
        claim(folder, {"model": fingerprint(source, torch.empty(0), {}), "max_new_tokens": max_new_tokens})
        shards = _record(model, folder, num_tokens, num_validation_tokens, max_new_tokens, use_tqdm)
        training, validation = ([Recording.load(path) for path in paths] for paths in shards)
        trainer = Trainer(base, training, validation, settings)
        trainer.train(work / "checkpoint.safetensors", use_tqdm=use_tqdm)
        vocabulary = trainer.vocabulary
        if 0 < said_vocab_size < len(vocabulary):
            vocabulary = trainer.most_frequent(said_vocab_size)
        head, tensors, quantization = quantise_head(trainer.head, base, training, bits=bits)
        result = acceptance(head, vocabulary, base, validation)
        report = {
            "teco_kernels": __version__,
            "settings": asdict(settings),
            "training_tokens": sum(len(part.token_ids) for part in training),
            "validation_tokens": sum(len(part.token_ids) for part in validation),
            "acceptance": result.shares(),
            "history": for_json(trainer.history),
        }
        save_recycle_head(out, head.config, tensors, vocabulary, base, report=report, quantization=quantization)
        shutil.rmtree(work)
    return trainer.history, result


def draw(history: Sequence[Progress], title: str, path: Path) -> None:
    """Write a PNG: loss and acceptance over the training; needs matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": "#868e96"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        x = [entry.tokens / 1e6 for entry in history]
        for axis, name in zip(figure.subplots(1, 2), ("loss", "acceptance"), strict=True):
            axis.plot(x, [getattr(entry, name) for entry in history], color="#adb5bd", label="training, with dropout")
            values = [getattr(entry, f"validation_{name}") for entry in history]
            axis.plot(x, values, color="#2563c9", marker="o", ms=3, label="validation")
            axis.set_title(name, loc="left", fontsize=10)
            axis.set_xlabel("million tokens")
            axis.grid(axis="y", color="#e9ecef")
            axis.set_axisbelow(True)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            axis.legend(frameon=False)
        figure.savefig(path, format="png", dpi=110)


def _record(
    model: str | Path, folder: Path, num_tokens: int, num_validation_tokens: int, max_new_tokens: int, use_tqdm: bool
) -> tuple[list[Path], list[Path]]:
    """Shards of training and of validation; the model is in memory only while they are made."""
    parts: list[tuple[Part, int]] = [("training", num_tokens), ("validation", num_validation_tokens)]
    max_model_len = min(_MAX_MODEL_LEN, load_source(model).config.max_position)
    llm = LLM(model, max_num_seqs=_MAX_NUM_SEQS, max_model_len=max_model_len, kv_cache_memory=_CACHE_MEMORY)
    training, validation = (
        record_part(llm, folder, part, num_tokens=count, max_new_tokens=max_new_tokens, use_tqdm=use_tqdm)
        for part, count in parts
    )
    return training, validation
