"""The hot loops as the compiler left them: a sum that is spilled to the stack costs more than any instruction saved."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

import teco_kernels

PRODUCT = re.compile(r"vpdpbusd|vpmaddubsw|vfmadd")
SPILL = re.compile(r"vmov\w+\s+%[xyz]mm\d+,.*\(%r[sb]p")
JUMP = re.compile(r"j\w+\s+([0-9a-f]+)")


class Loop(NamedTuple):
    """An innermost loop, unrolled by the compiler: its multiplications, and vectors that it writes to the stack."""

    num_products: int
    num_spills: int


class Instruction(NamedTuple):
    address: int
    text: str


def innermost_loops(code: list[Instruction]) -> list[Loop]:
    """The ranges that a backward jump closes and that hold no other such range."""
    ranges = []
    for instruction in code:
        jump = JUMP.match(instruction.text)
        if jump and code[0].address <= int(jump[1], 16) <= instruction.address:
            ranges.append((int(jump[1], 16), instruction.address))
    loops = []
    for begin, end in ranges:
        if any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in ranges):
            continue
        body = [instruction.text for instruction in code if begin <= instruction.address <= end]
        loops.append(Loop(sum(map(bool, map(PRODUCT.match, body))), sum(map(bool, map(SPILL.search, body)))))
    return loops


@pytest.fixture(scope="module")
def hot_loops() -> dict[str, Loop]:
    """By function, its loop with most multiplications."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text"]
    command.append(teco_kernels.get_library())
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = re.sub(r"\(anonymous namespace\)::|teco::cpu::|void ", "", heading[1]).split("(")[0]
            code = functions.setdefault(name, []) if re.search("_(tile|strip)<", name) else []
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(.*)", line):
            code.append(Instruction(int(instruction[1], 16), instruction[2]))
    return {
        name: max(loops)
        for name, code in functions.items()
        if (loops := [loop for loop in innermost_loops(code) if loop.num_products])
    }


def test_a_spill_is_found() -> None:
    code = [
        Instruction(0x10, "vpxor %xmm0,%xmm0,%xmm0"),
        Instruction(0x14, "vfmadd231ps (%rax),%ymm1,%ymm0"),
        Instruction(0x18, "vmovaps %ymm0,0x20(%rsp)"),
        Instruction(0x1C, "jne    14 <f+0x4>"),
        Instruction(0x20, "vmovaps %ymm0,0x40(%rsp)"),
        Instruction(0x24, "jne    10 <f>"),
    ]
    assert innermost_loops(code) == [Loop(1, 1)]


@pytest.mark.parametrize(
    ("pattern", "least", "share"),
    [
        # gptq_matmul, int8: all tiles. With 16 registers a tile of several rows spills a few sums per 72 products.
        (r"avx512::multiply_tile<", 100, 0),
        (r"avx2::multiply_tile<\d, \w+, 1, ", 20, 0),
        (r"avx2::multiply_tile<", 50, 1 / 8),
        # dense_matmul, and the exact mode of gptq_matmul.
        (r"avx(2|512)::fma_tile<", 16, 0),
        (r"avx512::sparse24_tile<", 20, 0),
        (r"avx2::sparse24_tile<", 20, 1 / 16),
        # paged_attention: query rows by keys.
        (r"avx512::score_tile<", 8, 0),
        (r"avx2::score_tile<(?!.*Float8)", 8, 0),
        (r"avx512::wide_score_tile<", 3, 0),
        (r"avx512::value_strip<", 1, 0),  # all of them under one name: the largest counts
    ],
)
def test_hot_loops_keep_their_sums_in_registers(
    pattern: str, least: int, share: float, hot_loops: dict[str, Loop]
) -> None:
    if "avx" not in " ".join(hot_loops):
        pytest.skip("no vector instruction set of this kind was compiled")
    loops = {name: loop for name, loop in hot_loops.items() if re.match(pattern, name)}
    assert len(loops) >= least, sorted(hot_loops)
    spilling = {name: loop for name, loop in loops.items() if loop.num_spills > share * loop.num_products}
    assert not spilling
