"""Comparison and selection (PTX ISA, "Comparison and Selection Instructions")."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import PtxError
from ptx.floats import decode, flush
from ptx.instructions.elementwise import elementwise
from ptx.instructions.registry import builds
from ptx.operands import reader, refuse, writer
from ptx.source import Instruction, Pair
from ptx.types import TYPES, Array, Type

if TYPE_CHECKING:
    from ptx.active import Active
    from ptx.block import Block
    from ptx.program import Program, Step

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _comparison(name: str, kind: Type, ftz: bool) -> Callable[[Array, Array], Array]:
    """Of floats, those without "u" are false where there is a NaN, those with it true."""
    if not kind.is_float:
        return _COMPARE[name]

    def compare(x: Array, y: Array) -> Array:
        a, b = decode(np.asarray(x), kind), decode(np.asarray(y), kind)
        if ftz:
            a, b = flush(a), flush(b)
        has_nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return has_nan if name == "nan" else ~has_nan
        if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            return has_nan | _COMPARE[name[:-1]](a, b)
        return ~has_nan & _COMPARE[name](a, b)

    return compare


_FLOAT_NAMES = {"equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}


@builds("setp")
def build_setp(program: Program, instruction: Instruction, step: Step) -> None:
    """p = a compared with b, combined with c; q = the contrary, combined with c."""
    kind = instruction.types()[-1]
    refuse(instruction, {*_COMPARE, *_FLOAT_NAMES, *_COMBINE, "ftz"})
    if kind.is_packed:
        raise PtxError(f"a type that is not known to the interpreter here: .{kind.name}")
    compare = _comparison(instruction.modifiers[0], kind, "ftz" in instruction.modifiers)
    combine = next((_COMBINE[word] for word in instruction.modifiers[1:] if word in _COMBINE), None)
    target, *sources = instruction.operands
    targets = (target.first, target.second) if isinstance(target, Pair) else (target,)
    pred = TYPES["pred"]
    writes = [writer(program, operand, pred) for operand in targets]
    a, b = (reader(program, operand, kind) for operand in sources[:2])
    c = reader(program, sources[2], pred) if combine else None

    def execute(block: Block, active: Active) -> None:
        result = compare(a(block), b(block))
        for write, value in zip(writes, (result, ~np.asarray(result)), strict=False):
            write(block, active, combine(value, c(block)) if combine and c else value)

    step.execute = execute


@builds("set")
def build_set(program: Program, instruction: Instruction, step: Step) -> None:
    """All ones, or 1.0, where the comparison holds."""
    result, kind = instruction.types()
    refuse(instruction, {*_COMPARE, *_FLOAT_NAMES, "ftz"})
    compare = _comparison(instruction.modifiers[0], kind, "ftz" in instruction.modifiers)
    yes = result.dtype(1) if result.is_float else np.array(-1).astype(result.dtype)[()]
    elementwise(
        program, instruction, step, result, [kind, kind], lambda a, b: np.where(compare(a, b), yes, result.dtype(0))
    )


@builds("selp")
def build_selp(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    refuse(instruction, set())
    sources = [kind, kind, TYPES["pred"]]
    elementwise(program, instruction, step, kind, sources, lambda a, b, c: np.where(c, a, b))


@builds("slct")
def build_slct(program: Program, instruction: Instruction, step: Step) -> None:
    """a where c is not negative, else b."""
    kind, condition = instruction.types()
    refuse(instruction, {"ftz"})
    elementwise(program, instruction, step, kind, [kind, kind, condition], lambda a, b, c: np.where(c >= 0, a, b))
