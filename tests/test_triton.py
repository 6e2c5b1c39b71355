"""The Triton kernels in Triton's interpreter: cases of the table, within the contract; how the backend is chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import teco_kernels as tk
from teco_kernels.ops import _library
from teco_kernels.ops.plan import Plan
from teco_kernels.ops.support import operators
from teco_kernels.ops.triton_backend import triton_device, use_triton
from teco_kernels.testing import TOLERANCE, Case, all_cases, run_case
from teco_kernels.testing.cases.matmul import random_checkpoint
from teco_kernels.triton_kernels import OPERATORS, launchers

# The interpreter computes with numpy, which tells of what IEEE arithmetic makes an infinity.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")

HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install -e '.[triton]')")


@contextmanager
def interpreter() -> Iterator[None]:
    """Within it, operators on CPU tensors run the Triton kernels in Triton's interpreter."""
    use_triton("cpu")
    try:
        yield
    finally:
        use_triton(None)


# An interpreted program costs some milliseconds, whatever it does: a case costs what its grid has of them.
CASES = [case for case in all_cases() if case.operator in OPERATORS and case.bytes_moved < 1e6 and case.flops < 2e7]


def quick() -> set[str]:
    """Cases for every run of the tests: of each operator, dtype and kind of kernel the smallest that is not empty."""
    smallest: dict[tuple[object, ...], Case] = {}
    kinds = ("bits", "activation", "minimum", "act_order", "weight", "weight_dtype", "cache_dtype", "scale", "layout")
    for case in CASES:
        setup = case.params.get("setup", "")
        if case.dtype != torch.float32 and "cache" not in setup:
            setup = ""  # what acts on scores sees fp32 in every dtype
        key = (case.operator, case.dtype, setup, *(case.params.get(kind) for kind in kinds))
        is_empty = any(
            case.params.get(size) == 0 for size in ("tokens", "rows", "sequences", "num_blocks", "hidden_size")
        )
        if (
            not is_empty
            and case.params.get("setup") != "empty"
            and (key not in smallest or case.flops < smallest[key].flops)
        ):
            smallest[key] = case
    return {case.name for case in smallest.values()}


_QUICK = quick()
MARKED = [pytest.param(case, id=case.name, marks=[] if case.name in _QUICK else [pytest.mark.triton]) for case in CASES]


@needs_triton
@pytest.mark.parametrize("case", MARKED)
def test_matches_reference(case: Case) -> None:
    with interpreter():
        assert tk.supports(case.operator, backend="triton", device="cpu", dtype=case.dtype, **case.params)
        result = run_case(case)
    assert result.ok, f"errors {result.errors} exceed {case.max_error}"


@needs_triton
def test_supported_operators() -> None:
    """What has no kernel says so, and stays where it is."""
    assert not tk.supports("rms_norm", backend="triton", device="cpu", dtype=torch.float32)
    with interpreter():
        answers = {op: tk.supports(op, backend="triton", device="cpu", dtype=torch.float32) for op in operators()}
        sections = tk.supports(
            "gptq_matmul",
            backend="triton",
            device="cpu",
            dtype=torch.float32,
            bits=4,
            activation="int8",
            section_size=64,
        )
        sparse = tk.Sparse24Weight.from_dense(torch.eye(16, 16))
        assert torch.equal(tk.sparse24_matmul(torch.ones(1, 16), sparse), torch.ones(1, 16))
    assert {op for op, answer in answers.items() if answer} == OPERATORS
    assert "no Triton kernel of sparse24_matmul" in answers["sparse24_matmul"].reason
    assert "GPU memory" in answers["all_reduce"].reason
    assert sections.reason == "section_size: the Triton kernels sum no sections apart, got 64"


@needs_triton
def test_the_kernels_run() -> None:
    """The interpreter is what computes: a kernel that is replaced shows in the results, and no longer when it ends."""
    from teco_kernels.triton_kernels import _launch

    launched = []
    x, weight = torch.randn(2, 8), torch.ones(8)
    with interpreter():
        _launch.launch_with(launched.append)
        try:
            out = torch.full_like(x, 7)
            torch.ops.teco_kernels.rms_norm(out, x, weight, 1e-6)
        finally:
            _launch.launch_with(None)
        assert torch.equal(out, torch.full_like(x, 7))
        assert [launch.kernel.__name__ for launch in launched] == ["rms_norm_kernel"]
    assert triton_device() is None
    torch.ops.teco_kernels.rms_norm(out, x, weight, 1e-6)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (8,), eps=1e-6))


@needs_triton
def test_arguments_are_checked() -> None:
    with interpreter():
        with pytest.raises(ValueError, match=r"rms_norm: weight: expected shape \[hidden_size\]"):
            tk.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-6)
        with pytest.raises(ValueError, match="token_ids: expected 0 to 3"):
            tk.embedding(torch.tensor([4]), torch.ones(4, 8))
        with pytest.raises(ValueError, match="in row 1"):
            tk.sample(torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), seed=0, offset=0)
        with pytest.raises(ValueError, match="cannot be recorded"):
            Plan(lambda: tk.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6), None)


@needs_triton
def test_what_is_not_checked_on_a_gpu() -> None:
    """Values there are not read before a call: ids that are none, numbers that are no probabilities."""
    from teco_kernels.triton_kernels.embedding import gptq_embedding

    calls: dict[str, tuple[Any, ...]] = {}
    embedding, projection, norm = torch.randn(20, 24), torch.randn(24, 48), torch.ones(24)
    token_ids = torch.tensor([0, 5, 6, 19])
    with interpreter():
        _library.record_calls(lambda operator, args: calls.update({operator.name(): args}))
        try:
            expected = tk.recycle_project(
                torch.randn(4, 24),
                token_ids,
                embedding,
                hidden_norm=norm,
                embedding_norm=norm,
                projection=projection,
                eps=1e-5,
            )
            tk.sample(torch.randn(9, 40), temperature=1.0, top_p=0.9, min_p=0.1, seed=0, offset=0)
        finally:
            _library.record_calls(None)
        out, *project = calls["teco_kernels::recycle_project"]
        tokens, logits, temperature, top_k, top_p, min_p, *draw = calls["teco_kernels::sample"]
        expected = expected.clone()
        token_ids.copy_(torch.tensor([0, -1, 20, 19]))
        launchers()["recycle_project"](out, *project)
        assert out[1:3].isnan().all()
        assert torch.equal(out[::3], expected[::3])

        first = int(tokens[0])
        temperature[1], temperature[2], top_p[3], top_p[4], top_p[5] = -1.0, torch.inf, 0.0, torch.nan, 1.5
        min_p[6], min_p[7], top_k[8] = 1.5, -0.5, -5
        launchers()["sample"](tokens, logits, temperature, top_k, top_p, min_p, *draw)
        assert tokens.tolist() == [first, *[-1] * 8]

        nothing = tk.GPTQWeight.from_checkpoint(**random_checkpoint(160, 16, 32, 4, torch.Generator())).packed[:0]
        rows = torch.ones(2, 160)
        gptq_embedding(rows, torch.tensor([3, 9]), nothing, None, 0, 160, 4, False, 9)
        assert not rows.any()


@needs_triton
def test_a_backend_that_cannot_be_chosen_leaves_the_one_that_was() -> None:
    with interpreter():
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            use_triton("cuda")
        assert triton_device() == "cpu"


@needs_triton
def test_errors_of_a_kernel_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from teco_kernels.triton_kernels import _launch

    def fail(launch: object) -> None:
        raise KeyError("planted")

    with interpreter():
        _launch.launch_with(fail)
        try:
            with pytest.raises(KeyError, match="planted"):
                tk.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
        finally:
            _launch.launch_with(None)


@needs_triton
def test_compiled_graphs_run_the_kernels() -> None:
    """The backend is chosen where an operator is dispatched, so also in a graph that was traced before."""
    x, weight = torch.randn(2, 8), torch.randn(8)
    norm = torch.compile(lambda x: tk.rms_norm(x, weight, 1e-6), fullgraph=True, backend="aot_eager")
    expected = norm(x)
    from teco_kernels.triton_kernels import _launch

    launched = []
    with interpreter():
        torch.testing.assert_close(norm(x), expected)
        _launch.launch_with(launched.append)
        try:
            norm(x)
        finally:
            _launch.launch_with(None)
    assert len(launched) == 1


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_stand_alone(dtype: torch.dtype) -> None:
    """A row's bits do not depend on the other rows. (On a GPU, unaligned ones may be summed in another order.)"""
    x, weight = torch.randn(5, 1100).to(dtype), torch.randn(1100).to(dtype)
    shifted = torch.empty(5, 1101, dtype=dtype)[:, 1:].copy_(x)
    checkpoint = random_checkpoint(160, 48, 32, 4, torch.Generator().manual_seed(0))
    packed = tk.GPTQWeight.from_checkpoint(**checkpoint)
    with interpreter():
        normed, gated = tk.rms_norm(x, weight, 1e-6), tk.silu_and_mul(x)
        product = tk.gptq_matmul(x[:, :160], packed)
        assert torch.equal(tk.rms_norm(shifted, weight, 1e-6), normed)
        assert torch.equal(tk.silu_and_mul(shifted), gated)
        for row in (0, 4):
            assert torch.equal(tk.rms_norm(x[row : row + 1], weight, 1e-6)[0], normed[row])
            assert torch.equal(tk.silu_and_mul(x[row : row + 1])[0], gated[row])
            assert torch.equal(tk.gptq_matmul(x[row : row + 1, :160], packed)[0], product[row])


@needs_triton
def test_sequences_stand_alone() -> None:
    """Attention of a sequence: the same bits in any company, whatever its blocks are."""
    generator = torch.Generator().manual_seed(1)
    lengths = [700, 3, 40, 257]
    table = torch.randperm(80, generator=generator).view(4, 20).int()[:, : -(-700 // 48)]
    keys, values, query = (torch.randn(shape, generator=generator) for shape in [(80, 48, 2, 64)] * 2 + [(4, 6, 64)])
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    with interpreter():
        out = tk.paged_attention(query, keys, values, table, seq_lens)
        for s in range(4):
            row = slice(s, s + 1)
            alone = tk.paged_attention(query[row], keys, values, table[row], seq_lens[row])
            assert torch.equal(alone[0], out[s])


@needs_triton
def test_unseen_keys_may_be_nan() -> None:
    """A key that one row sees and another does not spoils the other only through its value (paged_attention.py)."""
    query, keys, values = torch.randn(3, 2, 64), torch.randn(3, 16, 1, 64), torch.randn(3, 16, 1, 64)
    table, seq_lens = torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    keys[1, 6] = torch.nan  # position 38, that of the second row
    with interpreter():
        out = tk.paged_attention(query, keys, values, table, seq_lens, starts, sliding_window=1)
    assert torch.equal(out.isnan().any(-1).any(-1), torch.tensor([False, True, False]))


@needs_triton
def test_in_place() -> None:
    """Outputs that are inputs."""
    x, residual, weight = torch.randn(3, 600), torch.randn(3, 600), torch.randn(600)
    lse_a, lse_b, out_a, out_b = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3, 64), torch.randn(5, 3, 64)
    with interpreter():
        expected = (
            *tk.fused_add_rms_norm(x, residual, weight, 1e-6),
            *tk.merge_attention_states(out_a, lse_a, out_b, lse_b),
        )
        results = (
            *tk.fused_add_rms_norm(x, residual, weight, 1e-6, out=(x, residual)),
            *tk.merge_attention_states(out_a, lse_a, out_b, lse_b, out=(out_a, lse_a)),
        )
    for result, tensor in zip(results, expected, strict=True):
        assert torch.equal(result, tensor)


@needs_triton
def test_same_random_numbers_as_on_the_cpu() -> None:
    """The very tokens of the CPU's kernel, where no draw falls on the border between two: seeds are fixed."""
    logits = torch.randn(12, 300, generator=torch.Generator().manual_seed(3)) * 3
    options = {"temperature": 0.9, "top_k": [0, 20] * 6, "top_p": [1.0, 0.9, 0.7] * 4, "seed": 5}
    expected = tk.sample(logits, offset=list(range(12)), **options)
    with interpreter():
        assert torch.equal(tk.sample(logits, offset=list(range(12)), **options), expected)


def _run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env={**inherited, **environment}
    )


def test_import_brings_no_triton() -> None:
    """Neither the import nor a question about the backend, with Triton there or not; and without a warning."""
    program = """
import json, sys, time
import torch
start = time.process_time()
import teco_kernels
seconds = time.process_time() - start
answer = teco_kernels.supports("rms_norm", backend="triton", device="cuda", dtype=torch.float32)
assert not answer
print(json.dumps([seconds, "triton" in sys.modules]))
"""
    run = _run(program)
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    seconds, imported = json.loads(run.stdout)
    assert not imported
    assert seconds < 0.3


def test_without_triton() -> None:
    """The package works; who asks for the backend is told what is missing."""
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
import torch, teco_kernels
from teco_kernels.ops.triton_backend import use_triton
teco_kernels.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)
print(teco_kernels.supports("rms_norm", backend="triton", device="cuda", dtype=torch.float32).reason)
for device in ("cpu", "cuda"):
    try:
        use_triton(device)
    except ImportError as error:
        print(error)
"""
    run = _run(program)
    assert run.returncode == 0, run.stderr
    reason, cpu, cuda = run.stdout.splitlines()
    assert reason == "backend: expected the package triton, or a build with Triton kernels compiled ahead of time"
    assert cpu == "teco_kernels: the Triton interpreter needs the package triton; pip install 'teco_kernels[triton]'"
    assert "teco_kernels[triton]" in cuda


@needs_triton
def test_without_a_gpu() -> None:
    """The backend may be chosen where there is no GPU: no warning, no CUDA, and tensors of the CPU stay there."""
    program = """
import torch, teco_kernels
from teco_kernels.ops.triton_backend import use_triton
use_triton("cuda")
x = torch.ones(1, 4)
assert torch.equal(teco_kernels.rms_norm(x, torch.ones(4), 0.0), x)
print(teco_kernels.supports("rms_norm", backend="triton", device="cuda", dtype=torch.float32).reason)
assert not torch.cuda.is_initialized()
"""
    run = _run(program)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "device: torch finds no CUDA device\n"


@needs_triton
def test_the_interpreter_is_chosen_before_the_import() -> None:
    program = """
import torch, teco_kernels
from teco_kernels.ops.triton_backend import use_triton
try:
    use_triton("cpu")
except RuntimeError as error:
    print(error)
"""
    run = _run(program)
    assert run.returncode == 0, run.stderr
    assert "TRITON_INTERPRET=1 must be set before triton is imported" in run.stdout


@needs_triton
def test_rows_that_share_memory() -> None:
    """An outer stride of 0 is a stride."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    with interpreter():
        expected = tk.rms_norm(x, weight, 1e-6)
        assert torch.equal(tk.rms_norm(x.expand(2, 4, 8), weight, 1e-6), expected.expand(2, 4, 8))
