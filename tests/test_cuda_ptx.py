"""What nvcc emits for the CUDA kernels, interpreted: each inline instruction against its twin in the emulation, and
whole kernels over the case table, within the contract."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import struct
from collections.abc import Callable

import interpreted_cuda
import numpy as np
import pytest
import torch
from emulated_cuda import ROOT, emulation
from interpreted_cuda import interpretation
from kernel_calls import CALLS
from test_cuda_emulation import CASES, is_on_tensor_cores

import cuda_build
import teco_kernels as tk
from ptx import BankCounter, GlobalMemory, Kernel, PtxError, load
from teco_kernels.ops import gptq
from teco_kernels.testing import Case, run_case
from teco_kernels.testing.cases import collectives
from teco_kernels.testing.cases.matmul import random_checkpoint

NVCC = cuda_build.find_nvcc()
needs_nvcc = pytest.mark.skipif(
    NVCC is None or shutil.which("c++filt") is None, reason="nvcc or c++filt is not installed (docs/gpu.md, Building)"
)
FUNCTIONS = ROOT / "tests" / "simt" / "ptx_functions.cu"
BANKS = ROOT / "tests" / "data" / "cuda_banks.json"
INPUTS, OUTPUTS = 12, 4  # words of a thread
#: These take several GPUs and a clock: the interpreter has neither, tests/test_cuda_collectives.py both.
OF_RANKS = {"store_release", "load_acquire", "store_relaxed", "load_relaxed", "nanoseconds"}


def functions_of(header: str) -> set[str]:
    """Names of the functions that a header defines or declares."""
    text = (ROOT / "csrc" / header).read_text()
    return set(re.findall(r"^(?:inline |__device__ __forceinline__ )?\w[\w<>]* (\w+)\(", text, re.MULTILINE))


def test_every_function_is_tried() -> None:
    """Both headers have the same functions, and each has a kernel of its own; the copies share one."""
    functions = functions_of("cuda/ptx.h")
    assert functions == functions_of("simt/ptx.h")
    tried = set(re.findall(r"ptx::(\w+)(?:<\d>)?\(", FUNCTIONS.read_text()))
    assert functions <= tried | OF_RANKS, f"tests/simt/ptx_functions.cu lacks {functions - tried - OF_RANKS}"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, np.ndarray], np.ndarray]:
    """Runs a kernel of ptx_functions.cu in the emulation."""
    library = ctypes.CDLL(str(cuda_build.build_with_simt(tmp_path_factory.mktemp("twins"), FUNCTIONS, [])))
    library.run_function.restype = ctypes.c_char_p
    library.run_function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]

    def run(name: str, words: np.ndarray) -> np.ndarray:
        out = np.zeros((len(words), OUTPUTS), np.uint32)
        finding = library.run_function(name.encode(), words.ctypes.data, out.ctypes.data, len(words) // 32)
        assert finding is None, finding
        return out

    return run


@pytest.fixture(scope="module")
def compiled() -> Callable[[str, np.ndarray], np.ndarray]:
    """Runs it from nvcc's PTX."""
    text = interpreted_cuda.ptx_of(FUNCTIONS)
    by_name = {re.split(r"[:(]+", plain)[1]: entry for plain, entry in interpreted_cuda.entries(FUNCTIONS).items()}

    def run(name: str, words: np.ndarray) -> np.ndarray:
        out, memory = np.zeros((len(words), OUTPUTS), np.uint32), GlobalMemory()
        pointers = struct.pack("QQ", memory.add_array(words, False, "input"), memory.add_array(out, True, "output"))
        load(text, by_name[name]).launch((len(words) // 32, 1, 1), (32, 1, 1), [pointers], memory)
        return out

    return run


def edge_words() -> np.ndarray:
    """Words [n, INPUTS]: in the first column every half, floats around each rounding border of fp16, bf16 and int32,
    signed zeros, subnormals, infinities, NaN; elsewhere random bits."""
    borders = [0.5, 1.5, 2.5, 65504, 65519.996, 65520, 65536, 2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 2.0**31]
    borders += [2.0**31 - 128, 2.0**22 + 0.5, 2.0**23 + 0.5, 3.3895314e38, 3.4028235e38, 2.0**-126, 2.0**-149, 1e-40]
    borders += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-9, 127.5, 126.5, np.inf]
    floats = np.array([sign * x for x in borders for sign in (1, -1)], np.float32).view(np.uint32)
    near = np.concatenate([floats - 1, floats, floats + 1])
    specials = np.array([0, 0x80000000, 0x7FC00000, 0xFFC00001, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    random = np.random.default_rng(0)
    first = np.concatenate([near, specials, np.arange(0, 2**16, 37, dtype=np.uint32), np.full(32, 0x7C00, np.uint32)])
    first = np.concatenate([first, random.integers(0, 2**32, 2048 + (-len(first)) % 32, np.uint32)])
    words = random.integers(0, 2**32, (len(first), INPUTS), np.uint32)
    words[:, 0] = first
    return words


def operand_words(kind: str) -> np.ndarray:
    """Words [n, INPUTS] of factors in fp16 or bf16 and accumulators in fp32, the first warp with infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    factors = (
        torch.randn(16 * 32, 12, generator=generator) * torch.randint(1, 9, (16 * 32, 1), generator=generator) ** 4
    )
    factors[0, 3], factors[5, 8], factors[7, 2] = torch.inf, -torch.inf, torch.nan
    words = np.zeros((16 * 32, INPUTS), np.uint32)
    dtype = torch.float16 if kind == "half" else torch.bfloat16
    words[:, :6] = factors.to(dtype).view(torch.int16).numpy().view(np.uint32)
    words[:, 6:10] = torch.randn(16 * 32, 4, generator=generator).numpy().view(np.uint32)
    return words


def is_nan(words: np.ndarray) -> np.ndarray:
    return (words & 0x7FFFFFFF) > 0x7F800000


@needs_nvcc
@pytest.mark.parametrize("name", re.findall(r"^__global__ void (\w+)\(", FUNCTIONS.read_text(), re.MULTILINE))
def test_functions_agree(name: str, twins: Callable, compiled: Callable) -> None:
    """Bit for bit. Of an fp32 result that is NaN the ISA leaves the payload open."""
    words = operand_words(name.partition("_")[2]) if name.startswith("multiply") else edge_words()
    expected, out = twins(name, words), compiled(name, words)
    assert out.any()
    if name == "half_to_float" or name.startswith("multiply"):
        both = is_nan(expected) & is_nan(out)
        assert both.any()
        expected[both] = out[both] = 0
    differs = np.argwhere(expected != out)
    assert not len(differs), [(words[i].tolist(), expected[i].tolist(), out[i].tolist()) for i, _ in differs[:4]]


def quick() -> set[str]:
    """Cases for every run of the tests: of each operator and kind of kernel the smallest that has something to do."""
    smallest: dict[tuple[object, ...], Case] = {}
    for case in CASES:
        is_large = case.params.get("rows", 0) > 16
        if case.bytes_moved < 2000 or (case.operator in ("gptq_matmul", "paged_attention") and case.flops == 0):
            continue
        if is_large and not is_on_tensor_cores(case):
            continue
        key = (case.operator, is_large, case.params.get("activation"), "cache" in case.params.get("setup", ""))
        if key not in smallest or case.flops + case.bytes_moved < smallest[key].flops + smallest[key].bytes_moved:
            smallest[key] = case
    return {case.name for case in smallest.values()}


_QUICK = quick()
# The interpreter has one GPU: collectives are emulated only (tests/test_cuda_collectives.py).
_COLLECTIVES = {case.operator for case in collectives.cases()}
MARKED = [
    pytest.param(case, id=case.name, marks=[] if case.name in _QUICK else [pytest.mark.nvcc])
    for case in CASES
    if case.operator not in _COLLECTIVES
]


@needs_nvcc
@pytest.mark.parametrize("case", MARKED)
def test_kernels_match_reference(case: Case) -> None:
    """Whole kernels as nvcc compiles them, launched by the operators' own code."""
    with interpretation() as launched:
        result = run_case(case)
    assert launched or case.flops == 0
    assert result.ok, f"errors {result.errors} exceed {case.max_error}"


def tensor_core_call(dtype: torch.dtype) -> tuple[torch.Tensor, tk.GPTQWeight]:
    """Two blocks of columns, the last one in part as the rows are; three blocks of inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = tk.GPTQWeight.from_checkpoint(**random_checkpoint(96, 72, 32, 4, generator))
    return torch.randn(20, 96, generator=generator).to(dtype), weight


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensor_cores_bit_for_bit(dtype: torch.dtype) -> None:
    """gptq_matmul_tensor_cores whole: as in the emulation, whose mma sums in the same order."""
    x, weight = tensor_core_call(dtype)
    with emulation():
        expected = tk.gptq_matmul(x, weight)
    with interpretation() as launched:
        out = tk.gptq_matmul(x, weight)
    assert re.fullmatch(r".*gptq_tensor_cores_kernel<4, false, .*>\(.*", launched[0])
    assert torch.equal(out, expected)


@needs_nvcc
@pytest.mark.parametrize("activation", ["exact", "int8"])
def test_few_rows_bit_for_bit(activation: gptq.Activation) -> None:
    weight = tk.GPTQWeight.from_checkpoint(**random_checkpoint(160, 40, 32, 4, torch.Generator().manual_seed(0)))
    x = torch.randn(3, 160)
    with emulation():
        expected = tk.gptq_matmul(x, weight, activation=activation)
    with interpretation():
        assert torch.equal(tk.gptq_matmul(x, weight, activation=activation), expected)


def planted(text: str, lines: set[int], pattern: str, replacement: str) -> list[str]:
    """The PTX with the pattern replaced in one of these lines, once for each that has it."""
    rows = text.split("\n")
    found = [i for i in sorted(lines) if re.search(pattern, rows[i - 1])]
    return ["\n".join([*rows[: i - 1], re.sub(pattern, replacement, rows[i - 1]), *rows[i:]]) for i in found]


#: In the PTX of the tensor-core kernel: what is replaced, and by what.
BUGS = {
    "dropped barrier": (r"bar\.sync\s+0;", ""),
    "dropped wait": (r"cp\.async\.wait_group 0;", ""),
    "one group too few": (r"cp\.async\.wait_group 0;", "cp.async.wait_group 1;"),
    "another matrix": (r"(ldmatrix.*\{)(%\w+), (%\w+),", r"\1\3, \2,"),
    "other factors": (r"(mma.*\{)(%\w+), (%\w+)\}, (\{.*)", r"\1\3, \2}, \4"),
    "other mask of codes": (r"\b252645135\b", "117901063"),
}


@needs_nvcc
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str) -> None:
    """Wherever it is planted, the interpreter finds it or the result is another."""
    x, weight = tensor_core_call(torch.float16)
    with interpretation() as launched:
        expected = tk.gptq_matmul(x, weight)
    text, entry = interpreted_cuda.text_of(launched[0])
    variants = planted(text, interpreted_cuda.kernel(launched[0]).lines(that_ran=True), *BUGS[bug])
    assert variants
    for variant in variants[:: -(-len(variants) // 2)]:  # of many, two
        wrong = load(variant, entry)

        def find(name: str, wrong: Kernel = wrong) -> Kernel:
            return wrong

        try:
            with interpretation(find):
                out = tk.gptq_matmul(x, weight)
        except PtxError:
            continue
        assert not torch.equal(out, expected), bug


def bank_table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Cycles of the banks and their ideal, by call, kernel and instruction."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for call, function in CALLS.items():
        banks: dict[str, BankCounter] = {}
        if call.startswith("dense_matmul"):
            continue  # of which there is no CUDA kernel
        with interpretation(banks=banks):
            function()
        for name, counter in banks.items():
            kernel = re.search(r"(\w+)_kernel\b", name)
            assert kernel is not None
            found.setdefault(call, {})[kernel[1]] = {key: list(value) for key, value in counter.total().items()}
    return found


@needs_nvcc
def test_bank_conflicts() -> None:
    """As the table says, which `python tests/test_cuda_ptx.py` writes."""
    table = json.loads(BANKS.read_text())
    found = bank_table()
    if cuda_build.version(NVCC) == table["nvcc"]:
        assert found == table["calls"]
    tensor_cores = found["gptq_matmul, 40 rows"]["gptq_tensor_cores"]
    cycles, ideal = tensor_cores["ldmatrix"]  # rows are 80 bytes apart for its sake
    assert cycles == ideal > 0


if __name__ == "__main__":
    assert NVCC is not None
    rows = ",\n".join(f" {json.dumps(call)}: {json.dumps(kernels)}" for call, kernels in bank_table().items())
    BANKS.write_text(f'{{"nvcc": "{cuda_build.version(NVCC)}", "calls": {{\n{rows}\n}}}}\n')
