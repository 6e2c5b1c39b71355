"""The integer layouts of GPTQ and AWQ checkpoints: codes packed into int32 words."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ZeroPointFormat = Literal["v1", "v2"]

#: Bit widths that the checkpoint format knows.
BITS = (2, 3, 4, 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the first dimension.

    32 codes become `bits` words, read as one little-endian string of bits: code ``i`` begins at bit ``i * bits``. With
    3 bits, codes 10 and 21 lie across two words.

    Parameters
    ----------
    codes : Tensor
        Integers ``[n, m]`` in ``[0, 2**bits)``, where ``n * bits`` is a multiple of 32.
    bits : int
        2, 3, 4 or 8.

    Returns
    -------
    Tensor
        int32 ``[n * bits / 32, m]``.

    Raises
    ------
    ValueError
        When `bits` is another, codes do not fill whole words or do not fit.
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.shape[0] * bits % 32:
        raise ValueError(f"codes: expected shape [n, m] with n * {bits} a multiple of 32, got {list(codes.shape)}")
    codes = codes.to(torch.int64)  # before comparing: 256 is 0 to a tensor of bytes
    if codes.numel() and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f"codes: expected values from 0 to {2**bits - 1}, got {codes.min()} to {codes.max()}")
    words = codes.new_zeros(codes.shape[0] * bits // 32, codes.shape[1])
    period = codes_per_period(bits)
    words_per_period = period * bits // 32
    for place in range(period):
        word, shift = divmod(place * bits, 32)
        shifted = codes[place::period] << shift
        words[word::words_per_period] |= shifted & 0xFFFFFFFF
        if shift + bits > 32:
            words[word + 1 :: words_per_period] |= shifted >> 32
    # The highest bit is the sign of an int32.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_rows`: int32 ``[n * bits / 32, m]`` to uint8 ``[n, m]``."""
    _check_bits(bits)
    period = codes_per_period(bits)
    words_per_period = period * bits // 32
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[0] % words_per_period:
        raise ValueError(
            f"words: expected int32 [n, m] with n a multiple of {words_per_period}, "
            f"got {str(words.dtype).removeprefix('torch.')} {list(words.shape)}"
        )
    codes = torch.empty(words.shape[0] * 32 // bits, words.shape[1], dtype=torch.uint8)
    for place in range(period):
        word, shift = divmod(place * bits, 32)
        code = words[word::words_per_period] >> shift
        if shift + bits > 32:  # what the sign has filled in makes room for the next word
            code = code & (1 << 32 - shift) - 1 | words[word + 1 :: words_per_period] << 32 - shift
        codes[place::period] = code & (1 << bits) - 1
    return codes


def pack_zeros(zeros: Tensor, bits: int, zero_point_format: ZeroPointFormat = "v1") -> Tensor:
    """Pack zero points ``[num_groups, out_features]`` into ``qzeros``, along the outputs.

    "v1" stores the zero point minus one, so that it can be 1 to ``2**bits``; "v2" stores it as it is.

    Raises
    ------
    ValueError
        Also for a zero point that the format cannot hold: v1's field of a zero would be -1, and in a reader that
        subtracts from whole words it would borrow from its neighbour.
    """
    if zero_point_format not in ("v1", "v2"):
        raise ValueError(f"zero_point_format: expected 'v1' or 'v2', got {zero_point_format!r}")
    offset = 1 if zero_point_format == "v1" else 0
    if zeros.numel() and (zeros.min() < offset or zeros.max() >= 2**bits + offset):
        raise ValueError(
            f"zeros: expected values from {offset} to {2**bits - 1 + offset}, which {zero_point_format} can hold, "
            f"got {zeros.min()} to {zeros.max()}"
        )
    return pack_rows((zeros.to(torch.int64) - offset).t(), bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, zero_point_format: ZeroPointFormat = "v1") -> Tensor:
    """Inverse of `pack_zeros`: int64 ``[num_groups, out_features]``."""
    codes = unpack_rows(qzeros.t().contiguous(), bits).t().to(torch.int64)
    return codes + 1 if zero_point_format == "v1" else codes


def looks_like(qzeros: Tensor, bits: int, zero_point_format: ZeroPointFormat) -> bool:
    """Whether `qzeros`, read in this format, are all the middle of the codes, as in a symmetric checkpoint.

    Read in the other format they are then all one step off the middle, where no quantizer puts them.
    """
    fields = unpack_rows(qzeros.t().contiguous(), bits)
    return bool((fields == 2 ** (bits - 1) - (zero_point_format == "v1")).all())


def unpack_awq(words: Tensor) -> Tensor:
    """Unpack the 4-bit codes of AWQ's "gemm" layout: int32 ``[n, m / 8]`` to uint8 ``[n, m]``.

    A word holds eight neighbouring columns; its fields, lowest first, are columns 0, 2, 4, 6, 1, 3, 5, 7.

    References
    ----------
    Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978.
    """
    if words.dim() != 2 or words.dtype != torch.int32:
        raise ValueError(
            f"words: expected int32 [n, m / 8], got {str(words.dtype).removeprefix('torch.')} {list(words.shape)}"
        )
    # What >> draws in from the sign, & cuts off.
    fields = words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
    return fields.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(1).to(torch.uint8)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")


def codes_per_period(bits: int) -> int:
    """Codes after which their places in the words repeat: the sizes of a layer are multiples of it."""
    return 32 if bits == 3 else 32 // bits
