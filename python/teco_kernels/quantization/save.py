"""Writes a quantised model as a Hugging Face directory in the GPTQ format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from teco_kernels import __version__
from teco_kernels.assets import temporary_folder_beside
from teco_kernels.decoder.json_file import write_json
from teco_kernels.decoder.loader import Source
from teco_kernels.quantization.sparsity import Sparsity


def save_model(
    path: Path,
    source: Source,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a directory with the quantised `tensors` and everything else of `source`.

    Parameters
    ----------
    path : Path
        Appears at once, by a rename, when everything is written.
    source : Source
        The model that was quantised: configuration, tokenizer, embedding, norms, biases.
    tensors : mapping
        Quantised tensors by full name; ``lm_head.qweight`` and so on when the head is quantised, likewise
        ``model.embed_tokens.qweight``.
    settings : mapping
        Fields of `QuantizationSettings`.
    texts : mapping of str to str, optional
        Further files by name.
    """
    quantised = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    config = _config(source, quantised, settings)
    if source.config.tie_word_embeddings and "model.embed_tokens" in quantised:
        quantised.add("lm_head")  # where a file holds both, they are the same
    _save(path, source, tensors, quantised, config, texts)


def save_pruned_model(
    path: Path, source: Source, tensors: Mapping[str, Tensor], sparsity: Sparsity, method: str
) -> None:
    """Write a directory of plain weights with the pruned `tensors` and everything else of `source`.

    Parameters
    ----------
    path, source
        As in `save_model`.
    tensors : mapping
        Pruned weights by full name, in `dense_dtype`.
    sparsity : Sparsity
    method : str
        What pruned them.
    """
    config = _plain_config(source)
    # Names and values are those of compressed-tensors.
    config["sparsity_config"] = {
        "format": "dense",
        "sparsity_structure": "unstructured" if sparsity.pattern is None else str(sparsity),
        "global_sparsity": sparsity.share,
        "method": method,
    }
    _save(path, source, tensors, set(), config)


def _save(
    path: Path,
    source: Source,
    tensors: Mapping[str, Tensor],
    quantised: set[str],
    config: dict[str, Any],
    texts: Mapping[str, str] | None = None,
) -> None:
    dtype = dense_dtype(source)
    dense = {
        name: source.tensor(name).to(dtype)
        for name in source.names()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in quantised) and name not in tensors
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder_beside(path) as folder:
        out = folder / "model"
        out.mkdir()
        save_file({**dense, **tensors}, out / "model.safetensors", metadata={"format": "pt"})
        write_json(out / "config.json", config)
        source.tokenizer.save(out)
        for name, text in (texts or {}).items():
            (out / name).write_text(text, encoding="utf-8")
        # safetensors makes files that only their owner may read.
        shutil.copymode(out / "config.json", out / "model.safetensors")
        os.rename(out, path)


def dense_dtype(source: Source) -> torch.dtype:
    """What unquantised tensors are stored in: as they are, but fp16 for fp32.

    fp16 rather than bf16: three more bits, and weights are far from where its range ends.
    """
    stored: torch.dtype = source.tensor("model.embed_tokens.weight").dtype
    return torch.float16 if stored == torch.float32 else stored


def _plain_config(source: Source) -> dict[str, Any]:
    config = dict(source.raw_config)
    config.pop("dtype", None)
    config["torch_dtype"] = str(dense_dtype(source)).removeprefix("torch.")
    return config


def _config(source: Source, quantised: set[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    config = _plain_config(source)
    quantization: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "sym": settings["symmetric"],
        "desc_act": settings["act_order"] is True,  # the other orders leave groups of neighbours
        "damp_percent": settings["dampening"],
        "checkpoint_format": "gptq",
        "meta": {"quantizer": [f"teco_kernels:{__version__}"]},
    }
    if settings["sparsity"] is not None:
        quantization["meta"]["sparsity"] = str(Sparsity.parse(settings["sparsity"]))
    rules: dict[str, Any] = {}
    outer = {"group_size": settings["head_group_size"], "sym": True, "desc_act": False}  # of head and embedding
    if "lm_head" in quantised:
        # Tools that do not know of a quantised head beside a tied embedding take the embedding, and are right too; the
        # mark would have them look for a head of their own.
        quantization["lm_head"] = not source.config.tie_word_embeddings
        rules["lm_head"] = {"bits": settings["head_bits"], **outer}
    if "model.embed_tokens" in quantised:
        rules[r"model\.embed_tokens"] = {"bits": settings["embedding_bits"], **outer}
    # The first rule that matches counts. None of the others' is meant for head and embedding.
    rules |= {pattern: {"bits": bits} for pattern, bits in settings["layer_bits"].items()}
    if rules:
        quantization["dynamic"] = rules
    config["quantization_config"] = quantization
    return config
