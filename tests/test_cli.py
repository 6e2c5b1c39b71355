"""The command: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import teco_kernels
from teco_kernels import cli
from teco_kernels.decoder.sampling_params import CompletionOutput, RequestError, RequestMetrics, RequestOutput
from teco_kernels.ops.support import operators
from teco_kernels.testing import Case, all_cases


def run(*args: str, code: int = 0, stdin: str | None = None) -> Any:
    result = CliRunner().invoke(cli.app, list(args), input=stdin, env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_info() -> None:
    output = run("info").stdout
    assert teco_kernels.__version__ in output
    assert "in use" in output
    for op in operators():
        assert op in output
    assert "no cuda kernel is compiled into this build" in output


def test_version() -> None:
    assert run("--version").stdout == f"teco_kernels {teco_kernels.__version__}\n"


def test_info_json() -> None:
    report = json.loads(run("info", "--json").stdout)
    assert report["machine"]["torch"] == torch.__version__
    assert report["instruction_sets"][report["machine"]["instruction_set"]].startswith("in use")
    rows = {(row["operator"], row["backend"]): row for row in report["operators"]}
    assert rows["rms_norm", "cpu"]["dtypes"] == ["float32", "float16", "bfloat16"]
    assert rows["rms_norm", "cuda"]["reason"]


def test_info_tells_why_an_instruction_set_is_not_used() -> None:
    command = [sys.executable, "-m", "teco_kernels", "info", "--json"]
    environment = os.environ | {"TECO_CPU_ISA": "baseline"}
    states = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert states["instruction_sets"]["baseline"] == "in use, as TECO_CPU_ISA=baseline asks"


def test_verify_one_operator(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    output = run("verify", "--operator", "rms_norm", "--threads", "1", "--json", str(file)).stdout
    assert "rms_norm" in output
    assert "silu_and_mul" not in output
    report = json.loads(file.read_text())
    assert report["failed"] == 0
    assert report["passed"] == len(report["cases"]) == sum(case.operator == "rms_norm" for case in all_cases())
    assert report["machine"]["threads"] == 1
    assert all(case["ok"] and case["errors"]["output 0"] <= case["max_error"] for case in report["cases"])


def _broken_case(fails: bool, operator: str = "silu_and_mul") -> Case:
    def function(x: torch.Tensor) -> torch.Tensor:
        if fails:
            raise RuntimeError("out of luck: expected shape [n, m]")
        return x * torch.nan

    return Case(
        operator=operator,
        params={"fails": fails},
        dtype=torch.float32,
        make_inputs=lambda generator: {"x": torch.ones(3)},
        function=function,
        reference=lambda x: x.double(),
        max_error=1e-5,
        bytes_moved=24,
        flops=3,
    )


def test_verify_reports_failures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teco_kernels.testing.all_cases", lambda: [_broken_case(True), _broken_case(False)])
    file = tmp_path / "report.json"
    output = run("verify", "--json", str(file), code=1).stdout
    assert "RuntimeError: out of luck: expected shape [n, m]" in output  # which is no markup
    assert "exceed 1e-05" in output
    assert "0 of 2 cases passed" in output
    report = json.loads(file.read_text())
    assert [case["ok"] for case in report["cases"]] == [False, False]
    assert report["cases"][1]["errors"] == {"output 0": None}


def test_verify_tells_what_it_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teco_kernels.testing.all_cases", lambda: [_broken_case(True, "no_kernel")])
    file = tmp_path / "report.json"
    output = run("verify", "--json", str(file)).stdout
    assert "not run, 1 cases of no_kernel: op: " in output
    assert "0 of 0 cases passed" in output
    report = json.loads(file.read_text())
    assert (report["passed"], report["failed"], report["unsupported"]) == (0, 0, 1)


def test_bench_quick(tmp_path: Path) -> None:
    json_file, png_file = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = [
        "--operator",
        "rms_norm",
        "--operator",
        "copy_blocks",
        "--json",
        str(json_file),
        "--png",
        str(png_file),
    ]
    output = run("bench", "--quick", "--seconds", "0.01", *arguments).stdout
    assert "Ceilings, measured in between" in output
    report = json.loads(json_file.read_text())
    assert [case["operator"] for case in report["cases"]] == ["rms_norm", "copy_blocks"]
    assert min(report["ceilings"].values()) > 1e8
    for case in report["cases"]:
        assert 0 < case["best"] <= case["quartiles"][0] <= case["seconds"] <= case["quartiles"][1]
        assert case["cold"]
        assert 0 < case["share_of_ceiling"] < 10
    assert png_file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "--device", "cuda"], 1, "teco-kernels: device: this torch sees no GPU"),
        (["verify", "--operator", "rms_morn"], 2, "teco-kernels: --operator: expected one of embedding, "),
        (["bench", "--json", "/nowhere/report.json"], 1, "teco-kernels: /nowhere: No such directory"),
        (["verify", "--json", "/nowhere/report.json"], 1, "teco-kernels: /nowhere: No such directory"),
        (["generate", "/nowhere/model", "Hello"], 1, "teco-kernels: /nowhere/model: No such file or directory"),
        (["score", "/nowhere/model", "/nowhere/text"], 1, "teco-kernels: /nowhere/text: No such file or directory"),
        (
            ["generate", "/nowhere", "Hello", "--top-p", "2"],
            1,
            "teco-kernels: top_p: expected a number in (0, 1], got 2",
        ),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments, code=code)
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_usage_errors() -> None:
    assert "prompt" in run("generate", "model", code=2).stderr.lower()
    run("bench", "--seconds", "0", code=2)
    run("frobnicate", code=2)


def test_interrupt_ends_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> list[Case]:
        raise KeyboardInterrupt

    monkeypatch.setattr("teco_kernels.testing.all_cases", interrupt)
    assert run("verify", code=130).stderr.strip() == ""


class FakeLLM:
    """Answers with the last word of the prompt, letter by letter."""

    def __init__(self, fails: bool = False) -> None:
        self.prompts: list[Any] = []
        self.fails = fails
        self.options: dict[str, Any] = {}
        self.engine = SimpleNamespace(recycler="a recycler")
        self.steps = 0

    def stream(self, prompt: Any, params: Any) -> Iterator[RequestOutput]:
        self.prompts.append(prompt)
        if self.fails:
            raise RequestError("request '0': its logits are not finite numbers", [])
        if "too long" in str(prompt):
            raise ValueError("prompt: expected fewer tokens than max_model_len")
        word = str(prompt).split()[-1]
        for index, letter in enumerate(word, start=1):
            answer = CompletionOutput(0, word[:index], list(range(index)), letter)
            metrics = RequestMetrics(1.0, 1.5, 3.5)
            yield RequestOutput("0", None, [1, 2, 3], [answer], index == len(word), metrics)

    def generate(self, prompt: Any, params: Any, *, use_tqdm: bool) -> list[RequestOutput]:
        assert not use_tqdm
        self.steps += 3 if self.engine.recycler else 5
        return [*self.stream(prompt, params)][-1:]

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages)

    def metrics(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "kv_cache_bytes": 64 << 20,
            "kv_blocks": 64,
            "kv_blocks_peak": 2,
            "kv_block_size": 16,
            "kv_waste_share": 0.125,
            "weight_bytes": 3 << 20,
        }

    def score(self, text: str, window: int | None = None) -> list[float]:
        return [-1.0] * (len(text) - 1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    llm = FakeLLM()

    def load(path: Path, **options: Any) -> FakeLLM:
        llm.options = options
        return llm

    monkeypatch.setattr("teco_kernels.cli.model.load_model", load)
    return llm


def test_generate_streams(fake: FakeLLM) -> None:
    assert run("generate", "model", "Hello [bold]world").stdout == "[bold]world\n"
    assert run("generate", "model", "-", stdin="from there").stdout == "there\n"
    assert fake.options["tensor_parallel_size"] == 1
    run("generate", "model", "Hello", "--tensor-parallel-size", "3")
    assert fake.options["tensor_parallel_size"] == 3


def test_generate_reports_a_failed_request(fake: FakeLLM) -> None:
    fake.fails = True
    assert "its logits are not finite numbers" in run("generate", "model", "Hello", code=1).stderr


def test_chat_keeps_the_conversation(fake: FakeLLM) -> None:
    run("chat", "model", "--system", "Be brief.", stdin="one\n\ntwo\n/new\nthree\n")
    assert fake.prompts == [
        "<system> Be brief. <user> one",
        "<system> Be brief. <user> one <assistant> one <user> two",
        "<system> Be brief. <user> three",
    ]


def test_chat_goes_on_after_a_line_that_cannot_be_answered(fake: FakeLLM) -> None:
    result = run("chat", "model", stdin="one\nfar too long\ntwo\n")
    assert fake.prompts[-1] == "<user> one <assistant> one <user> two"
    assert result.stderr.strip() == "teco-kernels: prompt: expected fewer tokens than max_model_len"


def test_score(fake: FakeLLM, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("eleven chars")
    output = run("score", "model", str(file), "--max-chars", "11").stdout
    assert "2.7183" in output
    assert "10" in output
    assert "expected at least two tokens" in run("score", "model", str(file), "--max-chars", "1", code=1).stderr
    file.write_bytes(b"\xff")
    assert run("score", "model", str(file), code=1).stderr.startswith(f"teco-kernels: {file}: expected UTF-8 text: ")


def test_demo_tells_what_it_took(fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teco_kernels.quantization.default_quantized_model", lambda: Path("model"))
    output = run("demo", "Say hello").stdout
    assert output.startswith("Say hellohello\n")
    answers = ("2 tokens/s", "4 tokens in 2000 ms, 5 steps", "4 tokens in 2000 ms, 3 steps")
    for text in ("6 tokens/s", *answers, "2 MiB", "32 slots at the most, 12.5%", "3 MiB"):
        assert text in output
    assert fake.engine.recycler == "a recycler"


def test_demo_finds_texts_that_differ(fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teco_kernels.quantization.default_quantized_model", lambda: Path("model"))
    stream = fake.stream
    monkeypatch.setattr(fake, "stream", lambda prompt, params: stream("a" * (3 + bool(fake.engine.recycler)), params))
    assert "recycled decoding gave another text than plain" in str(run("demo", "Say hello", code=1).exception)


def test_quantize_sums_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from teco_kernels.quantization import LayerReport, QuantizationSettings

    calls: list[tuple[QuantizationSettings, str | None]] = []

    def quantize_model(
        source: Path, out: Path, settings: QuantizationSettings, *, calibration: str | None
    ) -> list[LayerReport]:
        calls.append((settings, calibration))
        out.mkdir()
        (out / "model.safetensors").write_bytes(bytes(1024))
        kinds = {"q_proj": 0.01, "down_proj": 0.03}
        layers = [LayerReport(f"model.layers.7.mlp.{name}", e, 2 * e, 0.05, 4, 1.5) for name, e in kinds.items()]
        return [*layers, LayerReport("lm_head", 0.0025, 0.01, 0.01, 8, 1.0)]

    monkeypatch.setattr("teco_kernels.quantization.quantize_model", quantize_model)
    source, text = tmp_path / "model.gguf", tmp_path / "text"
    source.write_bytes(bytes(4096))
    text.write_text("Some text.")
    arguments = [
        "--group-size",
        "64",
        "--head-bits",
        "0",
        "--embedding-bits",
        "8",
        "--no-symmetric",
        "--calibration",
        str(text),
    ]
    arguments += ["--act-order", "group_aware", "--layer-bits", ".*v=x=8", "--asymmetric", "0.5", "--clip-search"]
    arguments += ["--png", str(tmp_path / "errors.png"), "--dampening", "0.05"]
    output = run("quantize", str(source), str(tmp_path / "out"), *arguments).stdout
    settings = QuantizationSettings(
        group_size=64,
        head_bits=None,
        embedding_bits=8,
        symmetric=False,
        act_order="group_aware",
        layer_bits={".*v=x": 8},
        asymmetric=0.5,
        clip_search=True,
        dampening=0.05,
    )
    assert calls == [(settings, "Some text.")]
    texts = ["1 KiB", "was 4 KiB", "3.00%"]
    for text_part in (*texts, "lm_head: 0.25%, 25% of rounding, 1.0 s", "7 1.0% 3.0% 50% 0.05 3.0"):
        assert text_part in " ".join(output.split())
    assert (tmp_path / "errors.png").stat().st_size > 1000
    assert calls.clear() is None
    assert run("quantize", str(source), str(tmp_path / "plain")).exit_code == 0
    assert calls == [(QuantizationSettings(), None)]


def test_quantize_refuses_rules_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"")
    result = run("quantize", str(source), "out", "--layer-bits", "v_proj", code=2)
    assert "--layer-bits: expected REGEX=BITS, got 'v_proj'" in result.stderr

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("teco_kernels.quantization.quantize_model", interrupt)
    assert "the same command goes on" in run("quantize", str(source), "out", code=130).stderr


def test_prune_sums_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from teco_kernels.quantization import PruningReport, PruningSettings

    calls: list[tuple[PruningSettings, str | None]] = []

    def prune_model(
        source: Path, out: Path, settings: PruningSettings, *, calibration: str | None
    ) -> list[PruningReport]:
        calls.append((settings, calibration))
        return [PruningReport("a", 0.01, 0.5), PruningReport("b", 0.03, 0.52)]

    monkeypatch.setattr("teco_kernels.quantization.prune_model", prune_model)
    (tmp_path / "model.gguf").write_bytes(b"")
    arguments = [str(tmp_path / "model.gguf"), str(tmp_path / "out"), "--sparsity", "0.5", "--method", "wanda"]
    output = run("prune", *arguments).stdout
    assert calls == [(PruningSettings("0.5", "wanda"), None)]
    for text_part in ("51.0% of their weights are 0, mean error of their outputs 2.00%", "3.00%"):
        assert text_part in output
