"""GGUF's simple block formats, whose codes, scales and offsets `GPTQWeight` holds as they are.

A block is 32 inputs of an output: an fp16 scale, in the ``_1`` formats an fp16 minimum, then the codes. The formats of
super-blocks (Q4_K, Q6_K, ...) have scales that are products of two numbers, too long for fp16.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

#: Bits per code of `GPTQWeight`: 5-bit codes are kept in 8.
BLOCK_FORMATS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q5_0: 8, Kind.Q5_1: 8, Kind.Q8_0: 8}
# The code that stands for 0, codes beginning at 0; formats with minima have none.
_ZERO_POINTS = {Kind.Q4_0: 8, Kind.Q5_0: 16, Kind.Q8_0: 128}
#: Inputs of a block.
BLOCK = 32


def read_blocks(rows: Tensor, kind: Kind) -> dict[str, Any]:
    """Take a matrix apart.

    Parameters
    ----------
    rows : Tensor
        uint8 ``[out_features, bytes]``: an output's blocks one after the other.
    kind : GGMLQuantizationType
        One of `BLOCK_FORMATS`.

    Returns
    -------
    dict
        Arguments of `GPTQWeight.from_codes`.
    """
    has_minimum = kind not in _ZERO_POINTS
    head, high_bytes = 4 if has_minimum else 2, 4 if kind in (Kind.Q5_0, Kind.Q5_1) else 0
    low_bytes = BLOCK if kind == Kind.Q8_0 else BLOCK // 2
    blocks = rows.unflatten(1, (-1, head + high_bytes + low_bytes))  # [out_features, groups, bytes]
    header, high, codes = blocks.split((head, high_bytes, low_bytes), dim=-1)
    scales = header.contiguous().view(torch.float16).unbind(-1)
    # A signed byte and 128; or input i in the nibble beside that of input i + 16.
    codes = codes ^ 128 if kind == Kind.Q8_0 else torch.cat((codes & 15, codes >> 4), dim=-1)
    if high_bytes:
        bits = high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1  # lowest first: input 8 * byte + bit
        codes = codes | bits.flatten(-2) << 4
    result: dict[str, Any] = {
        "codes": codes.flatten(1).t().contiguous(),
        "scales": scales[0].t(),
        "bits": BLOCK_FORMATS[kind],
    }
    if has_minimum:
        return result | {"minimum": scales[1].t()}
    return result | {"zeros": torch.full_like(result["scales"], _ZERO_POINTS[kind], dtype=torch.int32)}
