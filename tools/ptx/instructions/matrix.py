"""ldmatrix and mma.sync (PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions").

Element (row, column) of a fragment: a register holds 32 bits of a row of A, or of a column of B; lane / 4 is the row of
A (or the column of B), lane % 4 tells which 32 bits of eight rows by 16 bytes. The second register of A is eight rows
further down, then both once more 16 bytes further on.

The order of the sum, and its rounding, is left open by the ISA. Here floating products, exact in fp32, are summed one
after the other in fp32, beginning at 0, and the accumulator is added last.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ptx.active import WARP, Active
from ptx.errors import PtxError
from ptx.floats import decode
from ptx.instructions.registry import builds
from ptx.operands import address_reader, readers, writers
from ptx.source import Instruction
from ptx.types import TYPES, Array, Type

if TYPE_CHECKING:
    from ptx.block import Block
    from ptx.program import Program, Step


def _expect_whole_warps(active: Active) -> None:
    if not active.whole_warps:
        raise PtxError("expected all lanes of the warp at this instruction")


@builds("ldmatrix")
def build_ldmatrix(program: Program, instruction: Instruction, step: Step) -> None:
    """Lane i gives the address of row i % 8 of matrix i / 8; a lane gets two elements of row lane / 4 (.trans: of the
    column) of each matrix."""
    words = [word for word in instruction.modifiers if word not in ("trans", "cta")]
    if words[:3] != ["sync", "aligned", "m8n8"] or words[3] not in ("x1", "x2", "x4") or words[4:] != ["shared", "b16"]:
        raise PtxError(f"an instruction that is not known to the interpreter: ldmatrix.{'.'.join(words)}")
    count, is_transposed = int(words[3][1]), "trans" in instruction.modifiers
    address = address_reader(program, instruction.operands[1])
    writes = writers(program, instruction.operands[0], TYPES["u32"])
    if len(writes) != count:
        raise PtxError(f"expected {count} registers, got {len(writes)}")

    def execute(block: Block, active: Active) -> None:
        _expect_whole_warps(active)
        warps = np.flatnonzero(active.by_warp[:, 0])
        threads = (warps[:, None] * WARP + np.arange(8 * count)).ravel()  # whose addresses are looked at
        addresses = address(block)[threads] & np.uint64(0xFFFFFFFF)
        rows = block.shared.load(threads, addresses, 8, 2)
        if block.banks is not None:
            block.banks.count("ldmatrix", instruction.line, instruction.text, threads, addresses, 16)
        matrices = rows.reshape(len(warps), count, 8, 8)
        if is_transposed:
            matrices = matrices.swapaxes(2, 3)
        words_ = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), count, WARP)
        for i, write in enumerate(writes):
            values = np.zeros((block.shape[0] // WARP, WARP), np.uint32)
            values[warps] = words_[:, i]
            write(block, active, values.ravel())

    step.execute = execute


def _elements(words: Array, kind: Type) -> Array:
    """Registers [r, warps, 32] as [r, warps, 8, 16 bytes' worth of elements]."""
    elements = np.ascontiguousarray(words).view(kind.dtype)
    return elements.reshape(words.shape[0], words.shape[1], 8, -1)


def _first_factor(words: Array, kind: Type) -> Array:
    """A [warps, 16, K]."""
    parts = _elements(words, kind)
    columns = [np.concatenate([parts[i], parts[i + 1]], 1) for i in range(0, len(parts), 2)]
    return np.concatenate(columns, 2)


def _second_factor(words: Array, kind: Type) -> Array:
    """B by columns [warps, 8, K]."""
    return np.concatenate(list(_elements(words, kind)), 2)


def _product(a: Array, b: Array, kind: Type, other: Type) -> Array:
    """[warps, 16, 8]"""
    if not kind.is_float:
        return np.matmul(a.astype(np.int64), b.astype(np.int64).swapaxes(1, 2))
    x, y = decode(a, kind), decode(b, other)
    total = np.zeros((len(x), 16, 8), np.float32)
    for k in range(x.shape[2]):
        total = total + x[:, :, None, k] * y[:, None, :, k]
    return total


@builds("mma")
def build_mma(program: Program, instruction: Instruction, step: Step) -> None:
    """D = A * B + C of a warp: 16 x K by K x 8."""
    form = re.fullmatch(
        r"sync\.aligned\.m16n8k(\d+)\.row\.col\.(?:(f32)\.(f16|bf16|tf32)\.(f16|bf16|tf32)\.f32"
        r"|(?:satfinite\.)?(s32)\.([us]8)\.([us]8)\.s32)",
        ".".join(instruction.modifiers),
    )
    if form is None:
        raise PtxError(f"an instruction that is not known to the interpreter: mma.{'.'.join(instruction.modifiers)}")
    depth, result = int(form[1]), TYPES[form[2] or form[5]]
    first, second = TYPES[form[3] or form[6]], TYPES[form[4] or form[7]]
    if depth * first.bits not in (128, 256):
        raise PtxError(f"an instruction that is not known to the interpreter: mma of .{first.name} with k{depth}")
    saturates = "satfinite" in instruction.modifiers
    registers = depth * first.bits // 128  # of B; A has twice as many
    u32 = TYPES["u32"]
    writes = writers(program, instruction.operands[0], result)
    a, b = (readers(program, operand, u32) for operand in instruction.operands[1:3])
    c = readers(program, instruction.operands[3], result)
    if (len(a), len(b), len(c), len(writes)) != (2 * registers, registers, 4, 4):
        raise PtxError(f"expected fragments of {2 * registers}, {registers}, 4 and 4 registers")

    def execute(block: Block, active: Active) -> None:
        _expect_whole_warps(active)
        shape = (block.shape[0] // WARP, WARP)

        def words(reads: list) -> Array:
            return np.stack([np.broadcast_to(read(block), block.shape).reshape(shape) for read in reads])

        product = _product(_first_factor(words(a), first), _second_factor(words(b), second), first, second)
        sums = words(c)
        # Lane / 4 is the row, twice lane % 4 the column.
        parts = product.reshape(shape[0], 2, 8, 4, 2)
        for i, write in enumerate(writes):
            part = parts[:, i // 2, :, :, i % 2].reshape(shape)
            if result.is_float:
                total = sums[i] + part
            else:
                exact = sums[i].astype(np.int64) + part
                total = (np.clip(exact, -(2**31), 2**31 - 1) if saturates else exact).astype(np.int32)
            write(block, active, np.ascontiguousarray(total).ravel())

    step.execute = execute
