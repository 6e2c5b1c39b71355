"""The C interface: a program without Python that decodes, weights that it packs, and errors that it can read."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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


C_TYPES = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "TecoDType": ctypes.c_int32,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}


def structs() -> dict[str, type[ctypes.Structure]]:
    """The params of the header."""
    found: dict[str, type[ctypes.Structure]] = {}
    bare = re.sub(r"//[^\n]*|/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\}", bare, re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for kind, declared in re.findall(r"(?:const )?(\w+) ?([^;]+);", body):
            for field in declared.split(","):
                size = re.search(r"\[(\d+)\]", field)
                is_pointer = "*" in field or f"{kind}*" in body.split(declared)[0].rsplit(";", 1)[-1]
                one: Any = ctypes.c_void_p if is_pointer else {**C_TYPES, **found}[kind]
                fields.append((re.sub(r"[*\s]|\[.*", "", field), one * int(size[1]) if size else one))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


MEMORY = ctypes.create_string_buffer(1 << 16)
AT = ctypes.addressof(MEMORY)
CACHE = {"data": AT, "scale": AT, "scale_slot_stride": 1}
WRITE = {"key": AT, "value": AT, "slot_mapping": AT, "key_cache": CACHE, "value_cache": CACHE, "num_tokens": 1}
WRITE |= {"num_kv_heads": 1, "head_dim": 4, "block_size": 4, "cache_dtype": 3}
ATTENTION = {"num_tokens": 1, "num_seqs": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 4}
MATMUL = {"num_rows": 1, "in_features": 32, "out_features": 16, "num_groups": 1, "blocks_per_group": 1, "bits": 4}
NORM = {"hidden_size": 16, "input": AT, "weight": AT}
EMBEDDING = {"hidden_size": 16, "token_ids": AT, "weight": AT, "tokens": {"count": 1}}
PROJECTION = {"num_rows": 1, "in_features": 32, "out_features": 16, "out": AT, "weight": AT}
RECYCLE = {"embedding": EMBEDDING, "embedding_norm": NORM, "hidden_norm": NORM, "vocab_size": 1}

BAD_FIELDS = [
    ("rms_norm", {"num_rows": -1}, "num_rows: expected a number >= 0, got -1"),
    ("rms_norm", {"num_rows": 2**60}, "num_rows: expected at most 2^40, got "),
    (
        "rms_norm",
        {"num_rows": 1, "hidden_size": 4},
        "inner_rows: expected num_rows, or a number that divides it, got 0",
    ),
    ("rms_norm", {"num_rows": 1, "hidden_size": 4, "inner_rows": 1}, "out: expected an address"),
    ("silu_and_mul", {"dtype": 3}, "dtype: expected fp32 (0), fp16 (1) or bf16 (2), got 3"),
    ("rotary_embedding", {"rotary_dim": 3}, "rotary_dim: expected an even number, got 3"),
    ("sample", {"vocab_size": 0}, "vocab_size: expected 1 to 2^22, got 0"),
    ("sum_ranks", {"num_ranks": 9}, "num_ranks: expected 1 to 8, got 9"),
    ("sparse24_matmul", {"in_features": 6}, "in_features: expected a multiple of 4, got 6"),
    ("gptq_matmul", {**MATMUL, "bits": 5}, "bits: expected 2, 3, 4 or 8, got 5"),
    ("gptq_matmul", {**MATMUL, "in_features": 31}, "in_features: expected, without an input_order, "),
    ("gptq_matmul", {**MATMUL, "num_groups": 2**39, "blocks_per_group": 2**39}, "num_groups * blocks_per_group: "),
    ("gptq_matmul", MATMUL, "out, exact_out: expected one of the two, got neither"),
    ("gptq_matmul", {**MATMUL, "groups_per_section": 1}, "int8_activation: expected true, as there are sections"),
    ("reshape_and_cache", {"block_size": 0}, "block_size: expected a number >= 1, got 0"),
    ("reshape_and_cache", {**WRITE, "writes_scales": True}, "writes_scales: expected false, as one scale "),
    ("reshape_and_cache", {**WRITE, "cache_dtype": 0}, "key_cache.scale: expected a null pointer"),
    ("paged_attention", {**ATTENTION, "num_heads": 3}, "num_heads: expected a multiple of num_kv_heads = 2, got 3"),
    ("paged_attention", {**ATTENTION, "head_dim": 513}, "head_dim: expected 1 to 512, got 513"),
    ("paged_attention", {**ATTENTION, "num_seqs": 2}, "num_seqs: expected num_tokens, as there is no query_start_loc"),
    ("lm_head_argmax", {"matmul": {"num_rows": 1}}, "matmul.out_features: expected 1 to 2^32 - 1 tokens, got 0"),
    (
        "recycle_project",
        {"input": {**RECYCLE, "hidden_norm": {**NORM, "residual": AT}}, "projection": PROJECTION},
        "input.hidden_norm.residual, input.embedding_norm.residual: expected null pointers",
    ),
]


@pytest.mark.parametrize(("operator", "fields", "message"), BAD_FIELDS)
def test_a_bad_field_is_named(library: ctypes.CDLL, operator: str, fields: dict[str, Any], message: str) -> None:
    def fill(params: ctypes.Structure, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                fill(getattr(params, name), value)
            else:
                setattr(params, name, value)

    (kind,) = re.findall(rf"teco_{operator}\(const (\w+)\* params", HEADER.read_text())
    params = structs()[kind]()
    fill(params, fields)
    assert library[f"teco_{operator}"](ctypes.byref(params), 1) == INVALID_ARGUMENT
    assert library.teco_last_error().decode().startswith(message)
