"""ld, st, atom, red, and what only orders or hints (PTX ISA, "Data Movement and Conversion Instructions": ld, st;
"Parallel Synchronization and Communication Instructions": atom, red, membar)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.active import Active
from ptx.errors import PtxError
from ptx.floats import decode, encode
from ptx.instructions.registry import builds
from ptx.operands import LOCAL_WINDOW, SHARED_WINDOW, address_reader, reader, readers, refuse, writer, writers
from ptx.source import Address, Instruction
from ptx.types import UNSIGNED, Array, Type, as_bits

if TYPE_CHECKING:
    from ptx.block import Block
    from ptx.program import Program, Step

_SPACES = ("global", "shared", "local", "param", "const")
# Scopes, orders and hints: memory is sequentially consistent here, and there are no caches.
_HINTS = {
    *("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys"),
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified"),
    *("L1", "L2", "evict_first", "evict_last", "evict_normal", "evict_unchanged", "no_allocate", "cache_hint"),
    *("64B", "128B", "256B"),
}


def _space(instruction: Instruction) -> str:
    return next((word for word in instruction.modifiers if word in _SPACES), "generic")


def _spaces(instruction: Instruction, space: str, addresses: Array) -> list[tuple[str, Array, Array]]:
    """Which addresses lie in which state space, and there: [(space, which, addresses)]."""
    if space != "generic":
        return [("global" if space == "const" else space, np.ones(len(addresses), bool), addresses)]
    is_local = addresses >= np.uint64(LOCAL_WINDOW)
    is_shared = ~is_local & (addresses >= np.uint64(SHARED_WINDOW))
    parts = (
        ("local", is_local, LOCAL_WINDOW),
        ("shared", is_shared, SHARED_WINDOW),
        ("global", ~is_local & ~is_shared, 0),
    )
    return [(name, which, addresses - np.uint64(window)) for name, which, window in parts if which.any()]


def _local_places(block: Block, addresses: Array, size: int) -> Array:
    places = addresses.astype(np.int64)
    if int(places.min()) < 0 or int(places.max()) + size > block.local.shape[1] or (places % size).any():
        raise PtxError(f"out of bounds or misaligned: an access of {size} bytes of local memory at {int(places[0])}")
    return places[:, None] + np.arange(size)


def _load(block: Block, space: str, threads: Array, addresses: Array, count: int, width: int) -> Array:
    if space == "global":
        return block.memory.load(addresses, count, width)
    if space == "shared":
        return block.shared.load(threads, addresses, count, width)
    if space == "local":
        data = block.local[threads[:, None], _local_places(block, addresses, count * width)]
        return np.ascontiguousarray(data).view(UNSIGNED[8 * width])
    places = addresses.astype(np.int64)[:, None] + np.arange(count * width)
    if int(places.max()) >= len(block.parameters):
        raise PtxError("out of bounds: a read behind the parameters")
    return np.ascontiguousarray(block.parameters[places]).view(UNSIGNED[8 * width])


def _store(block: Block, space: str, threads: Array, addresses: Array, values: Array) -> None:
    if space == "global":
        block.memory.store(addresses, values)
    elif space == "shared":
        block.shared.store(threads, addresses, values)
    elif space == "local":
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        block.local[threads[:, None], _local_places(block, addresses, data.shape[1])] = data
    else:
        raise PtxError(f"expected memory that can be written, got .{space}")


def _count_banks(block: Block, instruction: Instruction, threads: Array, addresses: Array, size: int) -> None:
    if block.banks is not None:
        block.banks.count(instruction.name, instruction.line, instruction.text, threads, addresses, size)


@builds("ld", "ldu")
def build_load(program: Program, instruction: Instruction, step: Step) -> None:
    kind, space = instruction.types()[-1], _space(instruction)
    refuse(instruction, {*_HINTS, *_SPACES, "v2", "v4"})
    address = address_reader(program, instruction.operands[1])
    writes = writers(program, instruction.operands[0], kind)
    count, width = len(writes), kind.bytes

    def execute(block: Block, active: Active) -> None:
        threads = active.index
        addresses = address(block)[threads]
        data = np.empty((len(threads), count), UNSIGNED[kind.bits])
        for place, which, at in _spaces(instruction, space, addresses):
            data[which] = _load(block, place, threads[which], at[which], count, width)
            if place == "shared":
                _count_banks(block, instruction, threads[which], at[which], count * width)
        for i, write in enumerate(writes):
            values = np.zeros(block.shape, data.dtype)
            values[threads] = data[:, i]
            write(block, active, values.view(kind.dtype))

    step.execute = execute


@builds("st")
def build_store(program: Program, instruction: Instruction, step: Step) -> None:
    kind, space = instruction.types()[-1], _space(instruction)
    refuse(instruction, {*_HINTS, *_SPACES, "v2", "v4"})
    address = address_reader(program, instruction.operands[0])
    reads = readers(program, instruction.operands[1], kind)

    def execute(block: Block, active: Active) -> None:
        threads = active.index
        addresses = address(block)[threads]
        values = [np.broadcast_to(as_bits(np.asarray(read(block))), block.shape)[threads] for read in reads]
        data = np.stack(values, 1)
        for place, which, at in _spaces(instruction, space, addresses):
            _store(block, place, threads[which], at[which], data[which])
            if place == "shared":
                _count_banks(block, instruction, threads[which], at[which], len(reads) * kind.bytes)

    step.execute = execute


def _update(name: str, kind: Type) -> Callable[..., Array]:
    """What an atomic operation leaves, of the old value and its operands."""
    if kind.is_float:
        if name != "add":
            raise PtxError(f"an atomic operation that is not known to the interpreter: .{name}.{kind.name}")
        return lambda old, b: encode(decode(old, kind) + decode(b, kind), kind)
    one, zero = kind.dtype(1), kind.dtype(0)
    functions: dict[str, Callable[..., Array]] = {
        "add": lambda old, b: old + b,
        "and": lambda old, b: old & b,
        "or": lambda old, b: old | b,
        "xor": lambda old, b: old ^ b,
        "exch": lambda old, b: b,
        "min": np.minimum,
        "max": np.maximum,
        "inc": lambda old, b: np.where(old >= b, zero, old + one),
        "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - one),
        "cas": lambda old, b, c: np.where(old == b, c, old),
    }
    return functions[name]


_ATOMIC = {"add", "and", "or", "xor", "exch", "min", "max", "inc", "dec", "cas"}


@builds("atom", "red")
def build_atomic(program: Program, instruction: Instruction, step: Step) -> None:
    """One thread after the other, in the order of their numbers."""
    kind, space = instruction.types()[-1], _space(instruction)
    refuse(instruction, {*_HINTS, *_SPACES, *_ATOMIC, "noftz"})
    if kind.is_packed:
        raise PtxError(f"a type that is not known to the interpreter here: .{kind.name}")
    operation = next(word for word in instruction.modifiers if word in _ATOMIC)
    function = _update(operation, kind)
    operands = list(instruction.operands)
    write = writer(program, operands.pop(0), kind) if instruction.name == "atom" else None
    if not isinstance(operands[0], Address):
        raise PtxError(f"expected an address, got {operands[0]}")
    address = address_reader(program, operands.pop(0))
    reads = [reader(program, operand, kind) for operand in operands]

    def execute(block: Block, active: Active) -> None:
        threads = active.index
        addresses = address(block)[threads]
        values = [np.broadcast_to(read(block), block.shape)[threads] for read in reads]
        before = np.zeros(block.shape, kind.dtype)
        for place, which, at in _spaces(instruction, space, addresses):
            if place != "global":
                raise PtxError("atomic operations on shared memory are not known to the interpreter")
            for i in np.flatnonzero(which):
                one = at[i : i + 1]
                old = block.memory.load(one, 1, kind.bytes).view(kind.dtype)
                new = np.asarray(function(old[0], *(value[i : i + 1] for value in values)))
                block.memory.store(one, as_bits(new.astype(kind.dtype, copy=False))[:, None])
                before[threads[i]] = old[0, 0]
        if write is not None:
            write(block, active, before)

    step.execute = execute


@builds("membar", "fence", "prefetch", "prefetchu", "createpolicy", "discard")
def build_nothing(program: Program, instruction: Instruction, step: Step) -> None:
    """Orders what is in order here, or is about caches; a policy that is made is used by no one."""
    step.execute = lambda block, active: None
