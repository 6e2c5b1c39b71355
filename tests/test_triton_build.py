"""Triton kernels compiled ahead of time, without a GPU: what they take, and how the package's own launcher packs it."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from teco_kernels import _host, supports, triton_kernels
from teco_kernels.ops import support
from teco_kernels.testing import all_cases
from teco_kernels.triton_kernels import embedded
from teco_kernels.triton_kernels._launch import recorded
from teco_kernels.triton_kernels.ahead_of_time import Instance, Kernel, write
from teco_kernels.triton_kernels.calls import calls, launches_of
from teco_kernels.triton_kernels.calls import cases as compiled_cases
from teco_kernels.triton_kernels.dense_matmul import dense_matmul
from teco_kernels.triton_kernels.embedded import Compiled, Embedded, key_of, target_of
from teco_kernels.triton_kernels.gptq_matmul import gptq_matmul
from teco_kernels.triton_kernels.merge_attention_states import merge_attention_states
from teco_kernels.triton_kernels.paged_attention import paged_attention
from teco_kernels.triton_kernels.rms_norm import rms_norm
from teco_kernels.triton_kernels.rotary_embedding import rotary_embedding
from teco_kernels.triton_kernels.silu_and_mul import silu_and_mul

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import native_build

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install -e '.[triton]')"
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A process that compiles: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


class FakeDriver:
    """The library of fake_driver.c: what was launched last."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)

    def number(self, name: str, kind: Any = ctypes.c_int) -> Any:
        return kind.in_dll(self.library, name).value

    def numbers(self, name: str, count: int, kind: Any = ctypes.c_uint) -> list[int]:
        return list((kind * count).in_dll(self.library, name))

    def expect(self, sizes: list[int], error: int = 0) -> None:
        (ctypes.c_int * 64).in_dll(self.library, "fake_sizes")[:] = [*sizes, *[0] * (64 - len(sizes))]
        ctypes.c_int.in_dll(self.library, "fake_error").value = error

    def values(self, count: int) -> list[int]:
        return self.numbers("fake_values", count, ctypes.c_uint64)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    path = tmp_path_factory.mktemp("driver") / "libfake.so"
    source = Path(__file__).parent / "fake_driver.c"
    compiler = native_build.compiler().split()
    subprocess.run([*compiler, "-x", "c", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return FakeDriver(path)


@pytest.mark.parametrize("is_hip", [False, True])
def test_arguments_are_packed(driver: FakeDriver, is_hip: bool, tmp_path: Path) -> None:
    """Each at its own width, then two null pointers; grid, block, shared memory and stream as they were given."""
    library = tmp_path / f"lib{is_hip}.so"  # a driver is known by the name of its library
    library.symlink_to(driver.path)
    kernel = _host.DriverKernel(str(library), is_hip, b"image", "a_kernel", "pilf", 96, 60000, 0)
    assert driver.number("fake_name", ctypes.c_char * 256) == b"a_kernel"
    if not is_hip:
        assert driver.number("fake_attribute") == 8
        assert driver.number("fake_attribute_value") == 60000
    driver.expect([8, 4, 8, 4, 8, 8])
    kernel.launch((3, 2, 1), 77, [2**63 - 1, -5, -(2**40), 0.5])
    values = driver.values(7)
    assert values[0] == 2**63 - 1
    assert values[1] == 2**32 - 5
    assert values[2] == 2**64 - 2**40
    assert values[3] == struct.unpack("<I", struct.pack("<f", 0.5))[0]
    assert values[4:] == [0, 0, 0]
    assert driver.numbers("fake_grid", 3) == [3, 2, 1]
    assert driver.numbers("fake_block", 3) == [96, 1, 1]
    assert driver.number("fake_shared") == 60000
    assert driver.number("fake_stream", ctypes.c_void_p) == 77


def test_wrong_launches(driver: FakeDriver) -> None:
    kernel = _host.DriverKernel(driver.path, False, b"image", "a_kernel", "pi", 32, 0, 0)
    with pytest.raises(ValueError, match="expected 2 arguments, got 1"):
        kernel.launch((1, 1, 1), 0, [0])
    with pytest.raises(ValueError, match="argument 1: expected an integer of 32 bits"):
        kernel.launch((1, 1, 1), 0, [0, 2**31])
    with pytest.raises(ValueError, match="argument 0: expected an integer"):
        kernel.launch((1, 1, 1), 0, [0.5, 1])
    with pytest.raises(ValueError, match="expected a grid of 1 to"):
        kernel.launch((0, 1, 1), 0, [0, 1])
    with pytest.raises(ValueError, match='expected characters of "pilf"'):
        _host.DriverKernel(driver.path, False, b"image", "a_kernel", "x", 32, 0, 0)
    driver.expect([8, 4], error=700)
    with pytest.raises(RuntimeError, match=r"the launch of .* failed with error 700 \(CUDA_ERROR_ILLEGAL_ADDRESS\)"):
        kernel.launch((1, 1, 1), 0, [0, 1])
    with pytest.raises(RuntimeError, match="loading the module of kernel a_kernel failed with error 700"):
        _host.DriverKernel(driver.path, False, b"image", "a_kernel", "pi", 32, 0, 0)
    driver.expect([8, 4], error=999)
    with pytest.raises(RuntimeError, match=r"failed with error 999$"):
        kernel.launch((1, 1, 1), 0, [0, 1])
    driver.expect([])
    with pytest.raises(RuntimeError, match="no-such-driver"):
        _host.DriverKernel("no-such-driver.so", False, b"image", "a_kernel", "pi", 32, 0, 0)


def test_errors_of_hip_have_names(driver: FakeDriver, tmp_path: Path) -> None:
    library = tmp_path / "libhip.so"
    library.symlink_to(driver.path)
    driver.expect([], error=700)
    with pytest.raises(RuntimeError, match=r"failed with error 700 \(hipErrorIllegalAddress\)"):
        _host.DriverKernel(str(library), True, b"image", "a_kernel", "pi", 32, 0, 0)
    driver.expect([])


def test_a_fresh_thread_gets_a_context(driver: FakeDriver) -> None:
    """That of the device; once, and a thread that has one keeps it."""

    def load() -> _host.DriverKernel:
        return _host.DriverKernel(driver.path, False, b"image", "a_kernel", "pi", 32, 0, 3)

    def launch_twice() -> None:
        for _ in range(2):
            kernel.launch((1, 1, 1), 0, [0, 1])

    driver.expect([8, 4])
    before = driver.number("fake_retained")
    with ThreadPoolExecutor(1) as fresh:
        kernel = fresh.submit(load).result()
    assert driver.number("fake_retained") == before + 1
    assert driver.number("fake_device") == 3
    with ThreadPoolExecutor(1) as fresh:
        fresh.submit(launch_twice).result()
    assert driver.number("fake_retained") == before + 2


def test_hip_is_the_one_that_torch_has(driver: FakeDriver, tmp_path: Path) -> None:
    """The library that is mapped, else one in torch's directory, else whatever the loader finds."""
    mapped, beside = tmp_path / "with blank" / "libamdhip64.so.7", tmp_path / "lib"
    mapped.parent.mkdir()
    mapped.write_bytes(Path(driver.path).read_bytes())
    beside.mkdir()
    program = """
import ctypes, sys
from pathlib import Path
from teco_kernels.triton_kernels.embedded import hip_library
mapped, beside = sys.argv[1:]
print(hip_library(Path(beside)))
(Path(beside) / "libamdhip64.so").touch()
print(hip_library(Path(beside)))
ctypes.CDLL(mapped)
print(hip_library(Path(beside)))
"""
    found = run("-c", program, str(mapped), str(beside))
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["libamdhip64.so", str(beside / "libamdhip64.so"), str(mapped)]


def test_what_fits() -> None:
    kernel = Compiled("", "", "pil", 32, 0, multiples_of_16=(0, 1))
    assert kernel.fits([4096, 32, 2**40])
    assert not kernel.fits([4097, 32, 1])
    assert not kernel.fits([4096, 33, 1])
    assert not kernel.fits([4096, 2**31, 1])
    assert [target_of(*c) for c in ((8, 0), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "sm_80",
        "sm_87",
        "sm_80",
        "sm_90",
        "sm_100",
        "sm_120",
    ]


def _rms_norm(rows: int, size: int = 4096) -> None:
    x = torch.empty(rows, size, dtype=torch.float16)
    rms_norm(x, x, torch.empty(size, dtype=torch.float16), 1e-5)


def _matmul(rows: int) -> None:
    x = torch.empty(rows, 3584, dtype=torch.float16)
    weight = torch.empty(224, 28, 64 + 4 * 64 * 4, dtype=torch.uint8)
    gptq_matmul(x, x, weight, None, None, 3584, 3584, 4, False, False)


def _rotary(tokens: int, heads: int) -> None:
    query, key = (torch.empty(tokens, n, 128, dtype=torch.float16) for n in (heads, 4))
    rotary_embedding(torch.zeros(tokens, dtype=torch.int64), query, key, torch.empty(64, 128), False)


def _decode(sequences: int, heads: int, blocks: int, window: int = 0, size: int = 128) -> None:
    query, cache = (torch.empty(shape, dtype=torch.float16) for shape in ((sequences, heads, size), (8, 16, 4, size)))
    table, lengths = torch.zeros(sequences, blocks, dtype=torch.int32), torch.ones(sequences, dtype=torch.int32)
    nothing = [None] * 5
    paged_attention(query, None, query, cache, cache, table, lengths, *nothing, 0.1, 0.0, window, True)


def _merge(tokens: int, heads: int) -> None:
    state, lse = torch.empty(tokens, heads, 128), torch.empty(tokens, heads)
    merge_attention_states(state, lse, state, lse, state, lse)


@needs_triton
@pytest.mark.parametrize(
    ("function", "typical", "others"),
    [
        (_rms_norm, (32,), [(1,), (7,), (1000,)]),
        (_matmul, (32,), [(33,), (1000,)]),
        (_matmul, (16,), [(1,), (7,)]),
        (_rotary, (32, 32), [(7, 28), (1, 32)]),
        (_decode, (32, 32, 64), [(1, 32, 64), (7, 32, 64), (32, 28, 64), (32, 32, 21), (32, 32, 64, 1000)]),
        (_merge, (32, 32), [(7, 28)]),
    ],
)
def test_counts_choose_no_other_code(
    function: Callable[..., None], typical: tuple[int, ...], others: list[tuple[int, ...]]
) -> None:
    """Code for the typical call's multiples of 16 also takes any number of rows, sequences, heads, blocks and keys."""

    kernels = {}
    for launch in recorded(lambda: function(*typical)):
        parameters, multiples = Instance(launch).takes("aligned")
        kernels[key_of(launch)] = Compiled("", "", parameters, 0, 0, multiples)
    for other in others:
        for launch in recorded(lambda other=other: function(*other)):
            arguments = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in launch.args if v is not None]
            assert kernels[key_of(launch)].fits(arguments), (launch.kernel.__name__, other)


@needs_triton
def test_counts_are_not_specialised() -> None:
    """The same of code that is compiled just in time."""
    program = """
from teco_kernels.triton_kernels.paged_attention import paged_attention_kernel
from teco_kernels.triton_kernels.rms_norm import rms_norm_kernel
for kernel in (rms_norm_kernel, paged_attention_kernel):
    print(*(p.name for p in kernel.params if p.do_not_specialize))
"""
    names = run("-c", program)
    assert names.returncode == 0, names.stderr
    assert names.stdout.splitlines() == [
        "inner",
        "num_seqs num_heads group split_rows max_splits sliding_window block_table_stride",
    ]


def test_large_tensors() -> None:
    """A tensor of more than 2^31 elements takes the code of smaller ones, as long as its strides are of 32 bits."""
    x = torch.empty(1 << 20, 4096, dtype=torch.float16, device="meta")
    (launch,) = recorded(lambda: rms_norm(x, x, x[0], 1e-5))
    assert max(value for value in launch.args if isinstance(value, int)) < 2**31


def test_limits_of_a_grid() -> None:
    """What CUDA would refuse with a number is refused by name."""
    x = torch.empty(1, 16, dtype=torch.float16)
    columns = 65536 * 32
    with pytest.raises(ValueError, match="dense_matmul_kernel: expected at most 65535 programs"):
        dense_matmul(x, x, torch.empty(columns // 16, 16, 16, device="meta"), None, columns)


def test_kernels_of_other_sources_are_refused(tmp_path: Path) -> None:
    """An archive that was left by a build before."""
    archive = tmp_path / "kernels.zip"
    write([], archive)
    Embedded(archive, "no-driver.so")
    with ZipFile(archive, "w") as other:
        other.writestr("index.json", json.dumps({"source": "0" * 64, "kernels": []}))
    with pytest.raises(RuntimeError, match=r"kernels\.zip: expected kernels that were compiled from the files"):
        Embedded(archive, "no-driver.so")


@pytest.fixture
def only_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive that says of all instances that it has them for sm_90; no Triton, and a GPU, as `supports` sees it."""
    archive = tmp_path / "kernels.zip"
    kernels = [
        Kernel(key_of(launch), "sm_90", Compiled("f", "n", "", 32, 0, ()), b"") for launch in launches_of(calls())
    ]
    write(kernels, archive)
    monkeypatch.setattr(triton_kernels, "EMBEDDED", archive)
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(embedded, "device_target", {0: "sm_90", 1: "sm_75"}.__getitem__)
    return archive


def test_supports_asks_the_archive(only_embedded: Path) -> None:
    """Without Triton, a kernel is there when its instance is."""

    def ask(op: str, dtype: torch.dtype, device: str = "cuda", **case: Any) -> str:
        return supports(op, backend="triton", device=device, dtype=dtype, **case).reason

    for operator, dtype, case in compiled_cases():
        assert ask(operator, dtype, **case) == "", (operator, dtype, case)
    assert "rms_norm_kernel(*fp16,*fp16,*fp16,none,none,int,float" in ask("rms_norm", torch.float16, hidden_size=512)
    assert "was not compiled for sm_90 ahead of time" in ask("rms_norm", torch.float16, hidden_size=512)
    assert "was not compiled for sm_75" in ask("rms_norm", torch.float16, "cuda:1")
    assert "paged_attention_kernel" in ask("paged_attention", torch.float16, alibi_slopes=True)
    assert ask("recycle_project", torch.bfloat16, hidden_size=1024) == ""
    wide = {"rows": 1, "in_features": 16, "out_features": 2_097_136}
    assert "expected at most 65535 programs" in ask("dense_matmul", torch.float16, **wide)
    for case in all_cases():  # any case is answered
        if case.operator in triton_kernels.OPERATORS:
            ask(case.operator, case.dtype, **case.params)
    write([], only_embedded)
    embedded.open_archive.cache_clear()
    assert "rms_norm_kernel" in ask("rms_norm", torch.float16)
    with ZipFile(only_embedded, "w") as other:
        other.writestr("index.json", json.dumps({"source": "0" * 64, "kernels": []}))
    embedded.open_archive.cache_clear()
    assert "expected kernels that were compiled from the files beside it" in ask("rms_norm", torch.float16)


@needs_triton
def test_launches_agree_with_the_compiled_kernel(driver: FakeDriver, tmp_path: Path) -> None:
    """From a launch by an operator to the driver: the variant that fits, and a value for each parameter of its code."""

    archive = tmp_path / "kernels.zip"
    compiled = run("tests/compiled_triton.py", str(archive), ",".join(TARGETS), "silu_and_mul_kernel(*fp16")
    assert compiled.returncode == 0, compiled.stderr
    kernels = json.loads(compiled.stdout)
    assert len(kernels) == 2 * len(TARGETS)
    sizes = {"p": 8, "i": 4, "l": 8, "f": 4}
    for kernel in kernels:
        assert kernel["sizes"] == [*(sizes[letter] for letter in kernel["parameters"]), 8, 8], kernel["target"]

    x = torch.empty(3, 2048, dtype=torch.float16)
    unaligned = torch.empty(3, 1030, dtype=torch.float16)[:, :1024]  # a stride that is no multiple of 16
    launches = [*recorded(lambda: silu_and_mul(x[:, :1024], x)), *recorded(lambda: silu_and_mul(unaligned, x))]
    library = tmp_path / "libembedded.so"
    library.symlink_to(driver.path)
    kernels_of = Embedded(archive, str(library))
    for launch, variant in zip(launches, ("aligned", "general"), strict=True):
        (kernel,) = (k for k in kernels if k["target"] == "sm_90" and k["variant"] == variant)
        driver.expect(kernel["sizes"])
        assert kernels_of.run(launch, "sm_90", 0, 5)
        assert driver.number("fake_name", ctypes.c_char * 256).decode() == kernel["name"]
        assert driver.values(7) == [launch.args[0].data_ptr(), x.data_ptr(), *launch.args[2:], 0, 0]
        assert driver.numbers("fake_grid", 3) == [3, 1, 1]
        assert driver.numbers("fake_block", 3) == [kernel["block_threads"], 1, 1] == [128, 1, 1]
        assert driver.number("fake_shared") == kernel["shared_bytes"]
    assert not kernels_of.run(launches[0], "sm_75", 0, 5)
    other = launches[0]._replace(constants={"BLOCK": 512})
    assert not kernels_of.run(other, "sm_90", 0, 5)

    # And once more in a process that has no Triton: a kernel is then no more than a name.
    without = run("-c", _WITHOUT_TRITON, str(archive), driver.path)
    assert without.returncode == 0, without.stderr
    assert without.stdout == "False True\n"


@needs_triton
@pytest.mark.parametrize(
    ("only", "call"),
    [
        ("rms_norm_kernel(*fp16,*fp16,*fp16,none", lambda: _rms_norm(7, 64)),
        ("paged_attention_kernel(*fp16,none", lambda: _decode(7, 28, 64, size=64)),
    ],
)
def test_optional_and_floating_arguments_agree(
    driver: FakeDriver, tmp_path: Path, only: str, call: Callable[[], None]
) -> None:
    """Tensors that are not there take no parameter; numbers are fp32."""
    archive = tmp_path / "kernels.zip"
    compiled = run("tests/compiled_triton.py", str(archive), "sm_90", only)
    assert compiled.returncode == 0, compiled.stderr
    kernel = next(k for k in json.loads(compiled.stdout) if k["variant"] == "aligned")
    driver.expect(kernel["sizes"])
    library = tmp_path / "libembedded.so"
    library.symlink_to(driver.path)
    launch = recorded(call)[0]
    assert any(value is None for value in launch.args)
    assert any(isinstance(value, float) for value in launch.args)
    assert Embedded(archive, str(library)).run(launch, "sm_90", 0, 0)

    def packed(value: Any) -> int:
        if isinstance(value, float):
            return int.from_bytes(struct.pack("<f", value), "little")
        return value.data_ptr() if isinstance(value, torch.Tensor) else value

    expected = [packed(value) for value in launch.args if value is not None]
    assert driver.values(len(expected) + 3) == [*expected, 0, 0, 0]


@needs_triton
def test_attention_loads_whole_lines() -> None:
    """Keys and values of decode are copied 16 bytes at a time: what is known of their alignment reaches the loop."""
    program = """
import re
from teco_kernels.triton_kernels.ahead_of_time import instances
key = "KIND=float,FP32=False,SEQS=128,BLOCK_M=16,BLOCK_N=32,BLOCK_D=128"
instance = next(i for i in instances() if i.key.startswith("paged_attention_kernel(*fp16") and key in i.key)
ptx = instance.compile("sm_80", "aligned").asm["ptx"]
copies = re.findall(r"cp\\.async\\.cg\\.shared\\.global .*, 0x10,|cp\\.async\\.cg\\.shared\\.global .*, 16,", ptx)
print(len(copies), len(re.findall(r"ld\\.global\\S*\\.[bu](?:8|16) ", ptx)))
"""
    loads = run("-c", program)
    assert loads.returncode == 0, loads.stderr
    copies, elements = map(int, loads.stdout.split())
    assert copies > 0
    assert elements == 0


_WITHOUT_TRITON = """
import importlib.util, sys
from pathlib import Path
sys.modules["triton"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
import torch
from teco_kernels.triton_kernels import _language, _launch
from teco_kernels.triton_kernels.embedded import Embedded
from teco_kernels.triton_kernels.silu_and_mul import silu_and_mul
embedded = Embedded(Path(sys.argv[1]), sys.argv[2])
_launch.launch_with(lambda launch: print(_language.HAS_TRITON, embedded.run(launch, "sm_90", 0, 0)))
silu_and_mul(torch.empty(3, 1024, dtype=torch.float16), torch.empty(3, 2048, dtype=torch.float16))
"""

#: Bytes of shared memory that a program can have.
# Code for sm_80 also runs on sm_86 and sm_89, which have less.
SHARED_LIMITS = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}


@needs_triton
@pytest.mark.triton
def test_resources() -> None:
    """All kernels compile for all targets, and take what the table says."""
    check = run("tools/triton_build.py", "--check", "tests/data/triton_resources.json")
    assert check.returncode == 0, check.stdout + check.stderr


@needs_triton
@pytest.mark.triton
def test_other_variants() -> None:
    """Just in time, an integer that is 1 and no count is a constant: kernels compile where all are, and "general"."""
    program = """
from teco_kernels.triton_kernels.ahead_of_time import instances
seen = set()
for instance in instances():
    launch = instance.launch
    kind = (launch.kernel.__name__, *(a is None for a in launch.args), launch.constants.get("KIND"),
            launch.constants.get("BITS"), launch.constants.get("INT8"), launch.constants.get("FP32"))
    if kind not in seen:
        seen.add(kind)
        instance.compile("sm_90", "ones")
        instance.compile("sm_90", "general")
print(len({kind[0] for kind in seen}))
"""
    compiled = run("-c", program)
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stdout == "18\n"


@needs_triton
@pytest.mark.parametrize(
    ("only", "targets"),
    [
        ("silu_and_mul_kernel", TARGETS),
        ("FP32=False,SEQS=128,BLOCK_M=64,BLOCK_N=64,BLOCK_D=64", ("sm_90", "gfx942")),  # attention in prefill
    ],
)
def test_resources_of_some(only: str, targets: tuple[str, ...]) -> None:
    """The same for a few kernels, in every run of the tests."""
    table = "tests/data/triton_resources.json"
    check = run("tools/triton_build.py", "--check", table, "--only", only, "--targets", ",".join(targets))
    assert check.returncode == 0, check.stdout + check.stderr


def test_no_kernel_spills() -> None:
    """By the table; and shared memory is what a program can have.

    The exceptions: attention, a few bytes where NVIDIA's assembler stays at 128 or 168 registers, and in prefill where
    AMD's has used all 256; and the LM head on sm_100.
    """
    allowed = {("paged_attention_kernel", "gfx942"): 72, ("dense_argmax_kernel", "sm_100"): 8}
    allowed |= {("paged_attention_kernel", target): 24 for target in TARGETS if target.startswith("sm_")}
    table = json.loads((ROOT / "tests/data/triton_resources.json").read_text())["kernels"]
    assert all(set(by_target) == set(TARGETS) for by_target in table.values())
    for kernel, by_target in table.items():
        for target, taken in by_target.items():
            assert taken["spilled_bytes"] <= allowed.get((kernel.partition("(")[0], target), 0), (kernel, target)
            assert taken["shared_bytes"] <= SHARED_LIMITS[target], (kernel, target)
