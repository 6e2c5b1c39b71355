"""Parts of quantised matrices: what to read of packed tensors, and which groups the inputs of a part belong to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from teco_kernels.ops.gptq import BLOCK


def cover(part: slice, unit: int) -> tuple[slice, slice]:
    """The whole units of so many elements that a part lies in, and the part within these."""
    first, end = part.start // unit, -(-part.stop // unit)
    return slice(first, end), slice(part.start - first * unit, part.stop - first * unit)


def select_groups(groups: Tensor) -> tuple[Tensor, Tensor | None]:
    """Groups for some of the inputs of a layer.

    Parameters
    ----------
    groups : Tensor
        int64 ``[n]``: the group that each of the inputs has in the whole layer.

    Returns
    -------
    rows : Tensor
        int64: of the layer's scales and zero points, those that the part needs, in the order of the part's own groups.
    g_idx : Tensor or None
        int64 ``[n]``: each input's place in `rows`; None where groups are equal and one after the other. A group that a
        border has cut is made so, its row taken twice, where blocks allow it: groups are padded to the largest one.
    """
    borders = (groups.diff() != 0).nonzero().flatten().add(1).tolist()
    sizes = [end - begin for begin, end in zip([0, *borders], [*borders, len(groups)], strict=True)]
    size = math.gcd(*sizes)
    if len(sizes) == len(groups.unique()) and (size % BLOCK == 0 or size == max(sizes)):
        return groups[::size], None
    rows, g_idx = groups.unique(return_inverse=True)
    return rows, g_idx


def cut_inputs(tensors: dict[str, Any], inputs: slice, group_size: int) -> dict[str, Any]:
    """Arguments of `GPTQWeight.from_codes` for some of the inputs, which lie in groups of `group_size`."""
    codes = tensors["codes"][inputs]
    rows, g_idx = select_groups(torch.arange(inputs.start, inputs.stop) // group_size)
    per_group: dict[str, Any] = {
        name: tensors[name][rows] for name in ("scales", "zeros", "minimum") if name in tensors
    }
    return {**tensors, **per_group, "codes": codes, "g_idx": g_idx}
