"""The C interface: a program without Python that decodes, weights that it packs, and errors that it can read."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teco_kernels import GPTQWeight, get_include, get_library
from teco_kernels.ops.packing import pack_rows, pack_zeros

HERE = Path(__file__).resolve().parent
HEADER = Path(get_include()) / "teco_kernels.h"

#: What the header of each version declares: a program compiled against it must find just that in the library.
DECLARATIONS = {1: "708ed4d69b856f78"}

INVALID_ARGUMENT, UNSUPPORTED_CPU = 1, 3


class Checkpoint(ctypes.Structure):
    """TecoGptqCheckpoint."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qweight", "qzeros", "scales", "g_idx")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "num_groups")),
        ("bits", ctypes.c_int32),
        ("stores_zero_minus_one", ctypes.c_bool),
    )


class PackedSize(ctypes.Structure):
    """TecoGptqPackedSize."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("blocks_per_group", "weight_bytes", "num_inputs")),
        ("needs_input_order", ctypes.c_bool),
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(get_library())
    loaded.teco_last_error.restype = loaded.teco_instruction_set.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(HERE.parent / "tools"))
    import native_build

    return native_build.compiler()


def run_program(compiler: str, source: Path, output: Path, *flags: str) -> str:
    """What it prints, compiled in the language that the flags name."""
    command = [*compiler.split(), "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{get_include()}", *flags, str(source)]
    compiled = subprocess.run([*command, "-xnone", get_library(), "-o", output], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(get_library()).parent)}
    done = subprocess.run([output], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def operators() -> list[str]:
    names = re.findall(r"^TecoStatus teco_(\w+)\(const Teco\w+Params\* params", HEADER.read_text(), re.MULTILINE)
    assert len(names) >= 20
    return names


def test_a_program_decodes(compiler: str, tmp_path: Path) -> None:
    printed = run_program(compiler, HERE / "c_api" / "decode.cpp", tmp_path / "decode", "-xc++", "-std=c++17")
    assert re.fullmatch(r"token \d+ with \w+\n", printed)


def test_the_header_is_c(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "version.c"
    source.write_text('#include "teco_kernels.h"\nint main(void) { return teco_abi_version() != TECO_ABI_VERSION; }\n')
    run_program(compiler, source, tmp_path / "version", "-xc", "-std=c99")


def test_the_library_knows_neither_torch_nor_python(library: ctypes.CDLL) -> None:
    code = (
        "import ctypes, sys; ctypes.CDLL(sys.argv[1]); "
        "names = [line.split()[-1] for line in open('/proc/self/maps')]; "
        "assert not [name for name in names if 'torch' in name or 'libc10' in name], names"
    )
    subprocess.run([sys.executable, "-c", code, get_library()], check=True)


def test_declarations_change_with_the_version() -> None:
    header = HEADER.read_text()
    (version,) = map(int, re.findall(r"#define TECO_ABI_VERSION (\d+)", header))
    bare = re.sub(r"//[^\n]*|/\*.*?\*/", "", header, flags=re.DOTALL)
    digest = hashlib.sha256("".join(bare.split()).encode()).hexdigest()[:16]
    assert DECLARATIONS[version] == digest, "once this version is released, raise ABI_VERSION in tools/c_header.py"


@pytest.mark.parametrize("name", operators())
def test_no_params(library: ctypes.CDLL, name: str) -> None:
    assert library[f"teco_{name}"](None, 1) == INVALID_ARGUMENT
    assert library.teco_last_error() == b"params: expected an address, got a null pointer"


@pytest.mark.parametrize("name", operators())
def test_params_that_are_all_zero(library: ctypes.CDLL, name: str) -> None:
    """They ask for nothing, or it is said which of them must not be zero."""
    zeros = ctypes.create_string_buffer(4096)
    status = library[f"teco_{name}"](zeros, 1)
    assert status == 0 or re.match(rb"[\w.,\[\] ]+: expected .*, got ", library.teco_last_error())


def test_no_threads(library: ctypes.CDLL) -> None:
    assert library.teco_rms_norm(ctypes.create_string_buffer(4096), 0) == INVALID_ARGUMENT
    assert library.teco_last_error() == b"num_threads: expected a number >= 1, got 0"


def test_an_instruction_set_that_is_not_there() -> None:
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.teco_last_error.restype = ctypes.c_char_p; "
        "print(library.teco_silu_and_mul(PARAMS, 1), library.teco_last_error().decode())"
    ).replace("PARAMS", "(ctypes.c_int64 * 7)(*[ctypes.addressof(ctypes.create_string_buffer(64))] * 2, 1, 1, 1, 2, 0)")
    environment = {**os.environ, "TECO_CPU_ISA": "mmx"}
    command = [sys.executable, "-c", code, get_library()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(f"{UNSUPPORTED_CPU} TECO_CPU_ISA: expected one of [")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zero_point_format", ["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packs_what_python_packs(library: ctypes.CDLL, bits: int, zero_point_format: str, act_order: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    in_features, out_features, num_groups = 192, 96, 3
    offset = 1 if zero_point_format == "v1" else 0
    codes = torch.randint(0, 2**bits, (in_features, out_features), generator=generator)
    zeros = torch.randint(offset, 2**bits + offset, (num_groups, out_features), generator=generator)
    scales = torch.rand(num_groups, out_features, generator=generator).half()
    groups = torch.arange(in_features, dtype=torch.int32) // (in_features // num_groups)
    # Groups of unequal size, so that they are padded.
    groups = groups[torch.randperm(in_features, generator=generator)].index_fill_(0, torch.arange(5), 2)
    tensors = {
        "qweight": pack_rows(codes, bits),
        "qzeros": pack_zeros(zeros, bits, zero_point_format),  # type: ignore[arg-type]
        "scales": scales,
        "g_idx": groups if act_order else None,
    }
    checkpoint = Checkpoint(
        *(tensor.data_ptr() if tensor is not None else None for tensor in tensors.values()),
        in_features,
        out_features,
        num_groups,
        bits,
        zero_point_format == "v1",
    )
    expected = GPTQWeight.from_checkpoint(**tensors, bits=bits, zero_point_format=zero_point_format)  # type: ignore[arg-type]

    size = PackedSize()
    assert library.teco_gptq_packed_size(ctypes.byref(checkpoint), ctypes.byref(size)) == 0
    assert size.weight_bytes == expected.packed.nbytes
    assert size.needs_input_order == (expected.input_order is not None) == act_order
    packed = torch.empty_like(expected.packed)
    order = torch.empty(size.num_inputs, dtype=torch.int32)
    arguments = (ctypes.byref(checkpoint), ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(order.data_ptr()))
    assert library.teco_gptq_pack(*arguments) == 0
    if act_order:
        assert torch.equal(order, expected.input_order)
    made = GPTQWeight(packed, expected.input_order, None, in_features, out_features, bits, expected.group_size)
    assert torch.equal(made.dequantize(), expected.dequantize())
    if not act_order:  # no padding, whose codes are of no account
        assert torch.equal(packed, expected.packed)


def test_a_checkpoint_that_is_no_good(library: ctypes.CDLL) -> None:
    def error(**fields: int) -> str:
        words = torch.zeros(64, dtype=torch.int32)
        scales = torch.full((16,), 0x7C00, dtype=torch.int16)
        pointers = dict.fromkeys(("qweight", "qzeros"), words.data_ptr()) | {"scales": scales.data_ptr()}
        good = {"in_features": 32, "out_features": 16, "num_groups": 1, "bits": 4}
        checkpoint = Checkpoint(**{**pointers, **good, **fields})
        size = PackedSize()
        assert library.teco_gptq_packed_size(ctypes.byref(checkpoint), ctypes.byref(size)) == INVALID_ARGUMENT
        return library.teco_last_error().decode()

    assert error(bits=5) == "bits: expected 2, 3, 4 or 8, got 5"
    assert error(in_features=30).startswith("in_features: expected codes of 4 bits that fill whole words of 32, got 30")
    assert error(num_groups=3).startswith("num_groups: expected a number that divides in_features = 32")
    assert error(qzeros=0) == "qzeros: expected an address, got a null pointer"
    assert error() == "scales[0][0]: expected a finite number, got NaN or infinity"
