"""Models that several ranks share: answers are those of one rank, and what becomes of ranks that end."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from test_gptq_directory import quantise
from test_recycle_head import HEADS, Attentive, random_head
from test_shards import SIZES
from tiny_models import logits_of, random_model, relative_error, save_gguf, save_model

import teco_kernels
from teco_kernels import LLM, CommunicatorError, SamplingParams
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.ranks import Ranks
from teco_kernels.decoder.sampling_params import RequestError
from teco_kernels.training.head import Base

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 6, 7, 8] * 4, [9, 10, 11], [200, 3, 77, 41, 60, 1, 2]]


def start(path: Path, world_size: int, **options: Any) -> LLM:
    options = {"max_model_len": 128, "block_size": 4, "num_threads": 1, "tensor_parallel_timeout": 30.0, **options}
    return LLM(path, tensor_parallel_size=world_size, **options)


def processes(llm: LLM) -> list[subprocess.Popen[bytes]]:
    """Of the other ranks."""
    assert llm._ranks is not None
    return list(llm._ranks.processes)


def tokens(llm: LLM, params: Any, prompts: Any = PROMPTS) -> list[list[list[int]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def gptq_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    quantise(save_model(folder / "plain", random_model(**SIZES)), folder / "gptq", head=True)
    return folder / "gptq"


@pytest.fixture(scope="module", params=[2, 3])
def shared(request: pytest.FixtureRequest, gptq_path: Path) -> Iterator[tuple[LLM, LLM]]:
    """The model on one rank and on several."""
    exact: dict[str, Any] = {"gptq_activation": "exact", "recycle_head": "lookup"}
    with start(gptq_path, 1, **exact) as one, start(gptq_path, request.param, **exact) as several:
        yield one, several


def test_logits_are_close_and_do_not_depend_on_company(shared: tuple[LLM, LLM]) -> None:
    one, several = shared
    prompt = PROMPTS[0] * 3
    logits = logits_of(several, prompt)
    assert relative_error(logits, logits_of(one, prompt)) < 1e-5
    for chunks in ([1] * len(prompt), [20, 1, 1, 1, 25]):
        assert torch.equal(logits_of(several, prompt, chunks), logits)
    assert one.score(prompt) == pytest.approx(several.score(prompt), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("intermediate", "group_size"), [(320, 32), (320, 64), (320, -1), (1056, 64), (1056, -1), (416, 64), (320, 96)]
)
def test_bits_do_not_depend_on_the_number_of_ranks(
    intermediate: int, group_size: int, dtype: str, tmp_path: Path
) -> None:
    """With int8 activations: partial sums are exact."""
    sizes = SIZES | {"intermediate_size": intermediate, "attention_bias": True, "mlp_bias": True}
    model = save_model(tmp_path / "plain", random_model("llama", **sizes))
    quantise(model, tmp_path / "gptq", settings={"group_size": group_size})
    logits, exact = [], []
    for world_size in (1, 2, 3):
        with start(tmp_path / "gptq", world_size, dtype=dtype) as llm:
            layer = llm.engine.model.stack.layers[0]
            exact.append((layer.output.section_size, layer.down.section_size))
            logits.append([logits_of(llm, PROMPTS[0] * 3), logits_of(llm, PROMPTS[2], [3, 1, 1, 2])])
    assert exact[0] == exact[1] == exact[2]
    divides = intermediate % (group_size if group_size > 0 else intermediate) == 0
    assert (exact[0][1] is not None) == divides
    if divides and exact[0][0]:
        for one, several in itertools.product(logits[:1], logits[1:]):
            assert all(map(torch.equal, one, several))


@pytest.mark.parametrize("intermediate", [200, 64])
def test_layers_without_exact_sums_run_on_ranks(intermediate: int, tmp_path: Path) -> None:
    """A last group that is shorter; too few channels for sections of 32 on each rank."""
    model = save_model(tmp_path / "plain", random_model("llama", **SIZES | {"intermediate_size": intermediate}))
    quantise(model, tmp_path / "gptq", settings={"group_size": 64 if intermediate == 200 else 32})
    for world_size in (1, 2, 3):
        with start(tmp_path / "gptq", world_size) as llm:
            assert llm.engine.model.stack.layers[0].down.section_size is None
            assert len(tokens(llm, SEVERAL_PARAMS["greedy"])) == len(PROMPTS)


SEVERAL_PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24),
    "sampled": SamplingParams(temperature=0.9, top_k=50, seed=3, max_tokens=24),
    "adjusted": SamplingParams(temperature=0, repetition_penalty=1.2, logit_bias={7: 2.0}, max_tokens=16),
    "log-probabilities": SamplingParams(temperature=0, logprobs=2, max_tokens=8),
    # Answers to one prompt share blocks, and copy them before they write.
    "many answers": SamplingParams(n=3, temperature=0.9, seed=5, max_tokens=12),
}


@pytest.mark.parametrize("kind", SEVERAL_PARAMS)
def test_tokens_are_those_of_one_rank(kind: str, shared: tuple[LLM, LLM]) -> None:
    one, several = shared
    assert tokens(several, SEVERAL_PARAMS[kind]) == tokens(one, SEVERAL_PARAMS[kind])


def test_a_greedy_request_says_the_same_beside_one_that_needs_logits(shared: tuple[LLM, LLM]) -> None:
    greedy = SEVERAL_PARAMS["greedy"]
    alone = tokens(shared[1], greedy, PROMPTS[:2])
    mixed = tokens(shared[1], [greedy, greedy, SEVERAL_PARAMS["sampled"]])
    assert mixed[:2] == alone


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("head", ["one layer", "two narrow layers"])
def test_a_recycle_head_says_on_ranks_what_it_says_alone(
    head: str, verify: bool, gptq_path: Path, tmp_path: Path
) -> None:
    folder = random_head(tmp_path / "head", Base(load_source(gptq_path)), **HEADS[head])
    params = [SamplingParams(temperature=t, seed=3, max_tokens=24, ignore_eos=True) for t in (0, 0, 0.9)]
    said = []
    for world_size in (1, 2):
        with start(gptq_path, world_size, recycle_head=folder, recycle_verify=verify) as llm:
            llm.engine.recycler = Attentive(verify=verify)
            said.append((tokens(llm, params), {k: v for k, v in llm.metrics().items() if k.endswith("_tokens")}))
            if verify:
                with start(gptq_path, 1) as plain:
                    assert tokens(plain, params) == said[-1][0]
    assert said[0] == said[1]
    assert said[0][1]["guessed_tokens"] > 20


def test_a_full_cache_is_preempted_on_all_ranks(gptq_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    options: dict[str, Any] = {"gptq_activation": "exact", "kv_cache_memory": 1 << 17}
    with start(gptq_path, 1, **options) as one, start(gptq_path, 2, **options) as two:
        prompts = [PROMPTS[i % 3] + [i] for i in range(8)]
        assert tokens(two, params, prompts) == tokens(one, params, prompts)
        assert two.metrics()["preemptions"] == one.metrics()["preemptions"] > 0
        assert two.metrics()["kv_cache_bytes"] == one.metrics()["kv_cache_bytes"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_models_and_dtypes(dtype: str, tmp_path: Path) -> None:
    """A tied head, norms of heads, an 8-bit cache; half the numbers' bits."""
    path = save_gguf(tmp_path / "model.gguf", random_model("qwen3", **SIZES, tie_word_embeddings=True), "Q8_0")
    options: dict[str, Any] = {"dtype": dtype, "kv_cache_dtype": "int8", "gptq_activation": "exact"}
    with start(path, 1, **options) as one, start(path, 2, **options) as two:
        error = relative_error(logits_of(two, PROMPTS[2]), logits_of(one, PROMPTS[2]))
        assert error < (2e-2 if dtype == "bfloat16" else 5e-3)  # a rounding of the cache may go the other way
        assert tokens(two, SEVERAL_PARAMS["greedy"]) == tokens(two, SEVERAL_PARAMS["greedy"])


def test_logits_that_are_no_numbers_fail_one_request(tmp_path: Path) -> None:
    model = random_model(**SIZES)
    model.model.embed_tokens.weight.data[33] = torch.nan
    with start(save_model(tmp_path, model), 2) as llm:
        greedy = SEVERAL_PARAMS["greedy"]
        fine = tokens(llm, greedy, PROMPTS[1:2])
        with pytest.raises(RequestError, match="expected finite logits") as error:
            llm.generate([PROMPTS[1], [33, 4]], greedy, use_tqdm=False)
        assert error.value.outputs[0].outputs[0].token_ids == fine[0][0]


def test_wrong_arguments(gptq_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size: expected 1 to 3, the model's KV heads, got 4"):
        start(gptq_path, 4)
    for size in (0, True, "2"):
        with pytest.raises(ValueError, match="tensor_parallel_size: expected a positive integer"):
            start(gptq_path, size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tensor_parallel_timeout: expected a positive number"):
        start(gptq_path, 2, tensor_parallel_timeout=0)


# ---- ranks that end


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def is_gone(pid: int) -> bool:
    """Not even a zombie is left."""
    return not Path(f"/proc/{pid}").exists()


def test_ranks_end_with_the_model(gptq_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    llm = start(gptq_path, 3)
    pids = [process.pid for process in processes(llm)]
    assert len(pids) == 2
    llm.close()
    assert all(map(is_gone, pids))
    with pytest.raises(CommunicatorError, match="closed"):
        llm.generate(PROMPTS[0], use_tqdm=False)
    llm.close()
    llm = start(gptq_path, 2)
    (pid,) = (process.pid for process in processes(llm))
    del llm
    gc.collect()
    assert is_gone(pid)
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_fails_is_an_error(how: signal.Signals, gptq_path: Path) -> None:
    llm = start(gptq_path, 3, tensor_parallel_timeout=3.0)
    first, second = processes(llm)
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    os.kill(first.pid, how)
    said = "rank 1 has ended" if how == signal.SIGKILL else "rank 1 did not come within 3 s"
    with ends_within(20), pytest.raises(CommunicatorError, match=said):
        list(stream)
    assert is_gone(first.pid)
    assert is_gone(second.pid)


PARENT = """
import signal, sys
from teco_kernels import LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
llm = LLM(sys.argv[1], tensor_parallel_size=3, max_model_len=128, num_threads=1)
print(*(process.pid for process in llm._ranks.processes), flush=True)
while True:
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_the_process_that_started_them(how: signal.Signals, gptq_path: Path) -> None:
    package = str(Path(teco_kernels.__file__).parent.parent)
    command = [sys.executable, "-c", PARENT, str(gptq_path)]
    environment = os.environ | {"PYTHONPATH": package}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.2)
        os.kill(parent.pid, how)
        parent.wait(20)
        deadline = time.monotonic() + 10
        while not all(map(has_ended, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert all(map(has_ended, pids))


def has_ended(pid: int) -> bool:
    """Whether it runs no more; who takes over the children of a dead process need not ask for their exit codes."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_a_rank_that_fails_while_it_starts_is_an_error(gptq_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def killed(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", killed)
    with ends_within(20), pytest.raises(CommunicatorError, match="rank 1 has ended"):
        start(gptq_path, 2)


def test_a_rank_that_cannot_load_is_an_error(
    gptq_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 has the files open; the other one does not find them any more, and says so."""
    file, elsewhere = gptq_path / "config.json", tmp_path / "config.json"

    def start_without_file(*args: Any, **options: Any) -> Ranks:
        file.rename(elsewhere)
        return original(*args, **options)

    original = Ranks.start
    monkeypatch.setattr(Ranks, "start", start_without_file)
    try:
        with ends_within(30), pytest.raises(CommunicatorError, match="rank 1 has ended"):
            start(gptq_path, 2)
    finally:
        elsewhere.rename(file)
    assert "config.json: file is missing" in capfd.readouterr().err


# ---- ranks that torchrun has started

SCRIPT = """
import json, sys
from teco_kernels import LLM, SamplingParams, parallel
from teco_kernels.parallel import shared_memory

path, out, nodes, size = sys.argv[1:]
if nodes == "apart":
    import os
    shared_memory._host_identity = lambda: os.environ["GROUP_RANK"]
llm = LLM(path, tensor_parallel_size=int(size), max_model_len=128, block_size=4, num_threads=1,
          recycle_head="lookup", tensor_parallel_timeout=60.0)
assert llm.engine.model.comm.rank == 0  # the others do not come here
sampled = {"temperature": 0.9, "top_k": 50, "seed": 3}
params = [SamplingParams(max_tokens=24, **options) for options in ({"temperature": 0}, sampled)]
with llm:  # closes it before torch's own threads are torn down
    answers = [llm.generate(json.loads(sys.stdin.read() or "[[5, 6, 7]]"), p, use_tqdm=False) for p in params]
found = [[output.outputs[0].token_ids for output in outputs] for outputs in answers]
with open(out, "w") as file:
    json.dump([llm.engine.model.comm.backend, llm.engine.runner.replayed, found], file)
"""


def torchrun(folder: Path, *arguments: str, nodes: int, ranks: int) -> list[subprocess.Popen[bytes]]:
    """Ranks on one node, or on two that reach one another over the loopback interface."""
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    package = Path(teco_kernels.__file__).parent.parent
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(ranks // nodes)),
                *("--master-addr", "127.0.0.1", "--master-port", str(port)),
                *(str(folder / "script.py"), *arguments),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        for node in range(nodes)
    ]


@pytest.mark.parametrize(
    ("nodes", "ranks", "backend"), [(1, 2, "shared_memory"), (2, 2, "process_group"), (2, 4, "hierarchy")]
)
def test_ranks_of_torchrun(nodes: int, ranks: int, backend: str, tmp_path: Path) -> None:
    """On one node over shared memory; on two, as far as they can tell, over a process group, or over both."""
    out, path = tmp_path / "out.json", tmp_path / "gptq"
    sizes = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 320}
    quantise(save_model(tmp_path / "plain", random_model(**sizes)), path)
    arguments = str(path), str(out), "apart" if nodes == 2 else "here", str(ranks)
    launchers = torchrun(tmp_path, *arguments, nodes=nodes, ranks=ranks)
    try:
        codes = [launcher.wait(120) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert codes == [0] * nodes
    assert json.loads(out.read_text())[:2] == [backend, backend == "shared_memory"]
    with start(path, 1) as one:
        expected = [tokens(one, SEVERAL_PARAMS[kind], [[5, 6, 7]]) for kind in ("greedy", "sampled")]
    assert json.loads(out.read_text())[2] == [[answer for (answer,) in outputs] for outputs in expected]


def test_torchrun_with_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch, gptq_path: Path) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="tensor_parallel_size: expected 4, the ranks of the default process group"):
        start(gptq_path, 2)


def load_alike(_: Any, paths: list[str], max_num_seqs: list[int]) -> str:
    """Share a model with the group's other ranks; what became of it."""
    rank = torch.distributed.get_rank()
    try:
        options = {"max_model_len": 128, "tensor_parallel_timeout": 20.0, "num_threads": 1}
        with LLM(paths[rank], tensor_parallel_size=len(paths), max_num_seqs=max_num_seqs[rank], **options):
            return "loaded"
    except SystemExit:
        return "served"
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same, but for a few steps of training."""
    folder = tmp_path_factory.mktemp("two-models")
    model = random_model(**SIZES)
    first = save_model(folder / "first", model)
    model.model.layers[1].self_attn.q_proj.weight.data *= 1.001
    return [str(first), str(save_model(folder / "second", model))]


def test_ranks_of_a_group_have_one_model(two_models: list[str]) -> None:
    assert ranks.run(load_alike, 2, two_models[:1] * 2, [4, 4]) == ["loaded", "served"]
    message = "LLM: expected the same model on every rank, rank 1 differs from rank 0"
    assert ranks.run(load_alike, 2, two_models, [4, 4]) == [message] * 2
    message = "LLM: expected the same arguments on every rank, rank 1 differs from rank 0"
    assert ranks.run(load_alike, 2, two_models[:1] * 2, [4, 5]) == [message] * 2
