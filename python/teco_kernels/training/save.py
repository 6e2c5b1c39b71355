"""Writes recycle heads, quantised with GPTQ on what their base model has written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from teco_kernels.assets import temporary_folder_beside
from teco_kernels.decoder.json_file import write_json
from teco_kernels.decoder.recycle_head import CONFIG_NAME, WEIGHTS_NAME, RecycleHeadConfig, norm_fingerprint
from teco_kernels.ops.packing import BITS
from teco_kernels.quantization import gptq_quantize
from teco_kernels.quantization.calibration import Hessian
from teco_kernels.training.head import Base, RecycleHead
from teco_kernels.training.recording import Recording

#: The report's name in the folder of a head.
REPORT_NAME = "training_report.json"

_CALIBRATION_TOKENS = 40_000
_DAMPENING = 0.05


def quantise_head(
    head: RecycleHead, base: Base, recordings: Sequence[Recording], *, bits: int | None
) -> tuple[RecycleHead, dict[str, Tensor], dict[str, Any]]:
    """A head as it is to be saved.

    Parameters
    ----------
    head : RecycleHead
    base : Base
    recordings : sequence of Recording
        What it is calibrated on: some ten thousand tokens from the first on.
    bits : {2, 3, 4, 8}, optional
        None: fp16.

    Returns
    -------
    RecycleHead
        With the values of the tensors, for evaluation.
    dict of str to Tensor
        By their names in the file.
    dict
        What config.json says of it.
    """
    names = _linears(head).keys()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    hessians = {} if bits is None else _hessians(head, base, recordings)
    group_size = check_bits(head.config, bits)
    for name, tensor in head.state_dict().items():
        if bits is None or name not in names:
            tensors[f"mtp.{name}"] = tensor.half()
            values[name] = tensors[f"mtp.{name}"].float()
            continue
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": False, "clip_search": bits < 8}
        quantised = gptq_quantize(tensor, hessians[name], dampening=_DAMPENING, **options)
        stem = f"mtp.{name.removesuffix('weight')}"
        tensors |= {f"{stem}{part}": value for part, value in quantised.tensors().items()}
        values[name] = quantised.dequantize()
    saved = RecycleHead(head.config).eval()
    saved.load_state_dict(values)
    if bits is None:
        return saved, tensors, {}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False, "desc_act": False}
    return saved, tensors, {"quantization_config": settings}


def check_bits(config: RecycleHeadConfig, bits: int | None) -> int:
    """The group size with which a head is quantised; ValueError when it cannot be, with so many bits."""
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, or None for fp16, got {bits!r}")
    widths = {shape[1] for shape in config.shapes().values() if len(shape) == 2}
    for size in (64, 32):
        if not any(width % size for width in widths):
            return size
    if bits is not None:
        raise ValueError(f"bits: expected None for a head whose widths are no multiples of 32: {sorted(widths)}")
    return -1


def _linears(head: RecycleHead) -> dict[str, nn.Linear]:
    """Its linear layers, by the names of their weights."""
    return {f"{name}.weight": module for name, module in head.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def _hessians(head: RecycleHead, base: Base, recordings: Sequence[Recording]) -> dict[str, Tensor]:
    """Of the inputs of each linear layer, by the name of its weight."""
    linears = _linears(head)
    hessians = {name: Hessian(module.in_features) for name, module in linears.items()}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, hessian=hessians[name]: hessian.add(args[0]))
        for name, module in linears.items()
    ]
    was_training = head.training
    head.eval()
    num_tokens = 0
    try:
        for ids, _, hidden, _ in (text for recording in recordings for text in recording.sequences()):
            if len(ids) > 1:
                head(F.embedding(ids[1:], base.embedding), hidden[:-1].float(), [len(ids) - 1])
            num_tokens += len(ids)
            if num_tokens > _CALIBRATION_TOKENS:
                break
    finally:
        head.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: hessian.matrix() for name, hessian in hessians.items()}


def save_recycle_head(
    path: Path,
    config: RecycleHeadConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Tensor,
    base: Base,
    *,
    report: Mapping[str, Any],
    quantization: Mapping[str, Any],
) -> None:
    """Write a head, its configuration, and a report; all of it or nothing.

    Parameters
    ----------
    path : Path
        The folder to make.
    config : RecycleHeadConfig
    tensors, quantization : mapping
        As `quantise_head` gives them.
    vocabulary : Tensor
        int64, ascending: the tokens that the head says.
    base : Base
    report : mapping
    """
    is_all = len(vocabulary) == config.base_vocab_size
    config = replace(config, draft_vocab_size=None if is_all else len(vocabulary))
    with temporary_folder_beside(path) as folder:
        made = folder / "head"
        made.mkdir()
        draft = {} if is_all else {"draft_vocabulary": vocabulary}
        save_file({**tensors, **draft}, made / WEIGHTS_NAME, metadata={"format": "pt"})
        identity = {"base": base.name, "base_norm": norm_fingerprint(base.norm)}
        write_json(made / CONFIG_NAME, {**config.to_dict(), **identity, **quantization})
        write_json(made / REPORT_NAME, report)
        shutil.copymode(made / CONFIG_NAME, made / WEIGHTS_NAME)  # safetensors makes files for their owner only
        os.rename(made, path)
