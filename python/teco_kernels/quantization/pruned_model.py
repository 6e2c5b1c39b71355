"""Prunes a whole model: layer after layer, each calibrated on what the pruned layers before it give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.quantization.gptq import check_options
from teco_kernels.quantization.save import dense_dtype, save_pruned_model
from teco_kernels.quantization.settings import check_windows
from teco_kernels.quantization.sparsegpt import sparsegpt_prune
from teco_kernels.quantization.sparsity import Sparsity, SparsityLike, magnitude_mask, wanda_mask
from teco_kernels.quantization.stages import (
    Stage,
    calibration_windows,
    embed,
    factorise,
    open_source,
    stages,
    torch_layers,
)
from teco_kernels.quantization.torch_layer import STAGES, linear_shapes

PruningMethod = Literal["sparsegpt", "wanda", "magnitude"]


@dataclass(frozen=True)
class PruningSettings:
    """How `prune_model` prunes.

    Attributes
    ----------
    sparsity : float or str
        The share of weights to prune, or "n:m", n of every m consecutive inputs being kept.
    method : {"sparsegpt", "wanda", "magnitude"}
        See `sparsegpt_prune`, `wanda_mask` and `magnitude_mask`.
    dampening : float
        Of SparseGPT.
    num_sequences, sequence_length : int
        Windows of the calibration text, and their tokens.
    """

    sparsity: SparsityLike = "2:4"
    method: PruningMethod = "sparsegpt"
    dampening: float = 0.01
    num_sequences: int = 64
    sequence_length: int = 512

    def check(self, config: ModelConfig) -> None:
        """Raise a ValueError that names the setting when a model of these sizes cannot be pruned like this."""
        if self.method not in ("sparsegpt", "wanda", "magnitude"):
            raise ValueError(f"method: expected sparsegpt, wanda or magnitude, got {self.method!r}")
        check_options(dampening=self.dampening)
        check_windows(self.num_sequences, self.sequence_length)
        sparsity = Sparsity.parse(self.sparsity)
        for name, (_, in_features) in linear_shapes(config).items():
            try:
                sparsity.check(in_features)
            except ValueError as error:
                raise ValueError(f"model.layers.0.{name}: {error}") from None


@dataclass(frozen=True)
class PruningReport:
    """What became of one linear layer.

    Attributes
    ----------
    name : str
    error : float
        ``||(W - Q) X|| / ||W X||`` over the calibration inputs X.
    sparsity : float
        Share of its weights that are 0.
    """

    name: str
    error: float
    sparsity: float


def prune_model(
    source_path: str | Path,
    out_path: str | Path,
    settings: PruningSettings | None = None,
    *,
    calibration: str | Sequence[int] | None = None,
    use_tqdm: bool = True,
) -> list[PruningReport]:
    """Prune the linear layers of a model and save it as a directory of plain weights, zeros among them.

    The decoder packs 2:4 layers as `Sparse24Weight`; to other tools the directory is that of any unquantised model.
    Embedding, head, norms and biases stay as they are. Holds one layer's weights and activations at a time, beside the
    residual stream and the pruned matrices.

    Parameters
    ----------
    source_path, out_path, calibration, use_tqdm
        As in `quantize_model`.
    settings : PruningSettings, optional

    Returns
    -------
    list of PruningReport
        In the order of the model.

    Raises
    ------
    ValueError
        When `out_path` exists, the source is quantised, damaged or unknown, the text is too short, or the settings do
        not fit the model's sizes.
    """
    out_path = Path(out_path)
    settings = settings or PruningSettings()
    source = open_source(source_path, out_path)
    settings.check(source.config)
    dtype = dense_dtype(source)
    windows = calibration_windows(source, settings.num_sequences, settings.sequence_length, calibration)
    reports: list[PruningReport] = []
    tensors: dict[str, Tensor] = {}
    with (
        torch.inference_mode(),
        tqdm(
            desc="pruning", total=source.config.num_layers * sum(map(len, STAGES)), unit="matrix", disable=not use_tqdm
        ) as progress,
    ):
        for stage in stages(torch_layers(source, windows.shape[1]), embed(source, windows)):
            for name, weight, report in _prune_stage(stage, settings):
                tensors[f"{name}.weight"] = weight.to(dtype)
                reports.append(report)
                progress.update()
        save_pruned_model(out_path, source, tensors, Sparsity.parse(settings.sparsity), settings.method)
    return reports


def _prune_stage(stage: Stage, settings: PruningSettings) -> Iterator[tuple[str, Tensor, PruningReport]]:
    factor = None
    if settings.method == "sparsegpt":
        factor = factorise(stage.names, stage.hessian, dampening=settings.dampening)
    for name in stage.names:
        weight = stage.weight(name)
        try:
            if factor is not None:
                pruned = sparsegpt_prune(weight, factor, sparsity=settings.sparsity)
            elif settings.method == "wanda":
                pruned = weight * wanda_mask(weight, stage.hessian, sparsity=settings.sparsity)
            else:
                pruned = weight * magnitude_mask(weight, sparsity=settings.sparsity)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        stage.replace(name, pruned)
        zeros = (pruned == 0).double().mean().item()
        yield name, pruned, PruningReport(name, _relative_error(weight, pruned, stage.hessian), zeros)


def _relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    def square(matrix: Tensor) -> float:
        return (matrix @ hessian).mul_(matrix).sum().item()

    norm = square(weight.double())
    return math.sqrt(max(square(pruned.double() - weight.double()), 0.0) / norm) if norm > 0 else 0.0
