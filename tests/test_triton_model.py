"""Models of Triton Inference Server: what is written, read and sent, over a stand-in of its backend in this process.

The server itself is in test_tritonserver.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton_backend import InferenceResponse, MetricFamily, Request, fake_backend
from tiny_models import random_model, save_model, tiny_tokenizer

from teco_kernels import LLM, SamplingParams
from teco_kernels.integrations.triton_server import add_model
from teco_kernels.integrations.triton_server.protocol import INPUTS, OUTPUTS, read_request
from teco_kernels.integrations.triton_server.repository import read_options

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "The capital of France is"
TYPES = {"TYPE_BOOL": bool, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32, "TYPE_UINT64": np.uint64}


def tensors(**values: Any) -> dict[str, Any]:
    """As the server hands them over."""
    made = {}
    for name, value in values.items():
        spec = INPUTS[name]
        many = value if isinstance(value, list) else [value]
        if spec.data_type == "TYPE_STRING":
            texts = [text.encode() if isinstance(text, str) else text for text in many]
            made[name] = np.array(texts, dtype=np.object_)
        else:
            made[name] = np.array(many, dtype=TYPES[spec.data_type])
    return made


class TestRepository:
    def test_files(self, tmp_path: Path) -> None:
        model = tmp_path / 'a "model"\\'
        model.mkdir()
        folder = add_model(tmp_path / "repository", model, name="m", max_num_seqs=4, recycle_head=str(tmp_path / "h"))
        assert folder == tmp_path / "repository" / "m"
        assert "integrations.triton_server.model import TritonPythonModel" in (folder / "1" / "model.py").read_text()
        config = (folder / "config.pbtxt").read_text()
        assert "decoupled: true" in config
        assert 'name: "text_input", data_type: TYPE_STRING, dims: [ 1 ], optional: true' in config
        assert f'key: "model", value {{ string_value: {json.dumps(str(model))} }}' in config
        assert 'key: "max_num_seqs", value { string_value: "4" }' in config
        assert all(f'name: "{name}"' in config for name in (*INPUTS, *OUTPUTS))

    def test_what_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            add_model(tmp_path, tmp_path / "none")
        with pytest.raises(ValueError, match="nonsense: no such option"):
            add_model(tmp_path, tmp_path, nonsense=1)
        with pytest.raises(ValueError, match="max_num_seqs: expected int, got '4'"):
            add_model(tmp_path, tmp_path, max_num_seqs="4")
        with pytest.raises(ValueError, match="name: expected one that a folder may have"):
            add_model(tmp_path, tmp_path, name="a/b")
        add_model(tmp_path / "repository", tmp_path, name="m")
        with pytest.raises(FileExistsError):
            add_model(tmp_path / "repository", tmp_path, name="m")

    def test_options_are_read(self) -> None:
        def read(**values: str) -> tuple[Path, dict[str, Any]]:
            return read_options({name: {"string_value": value} for name, value in values.items()})

        assert read(model="/m", dtype="float16", block_size="8", EXECUTION_ENV_PATH="x") == (
            Path("/m"),
            {"dtype": "float16", "block_size": 8},
        )
        with pytest.raises(ValueError, match="expected a parameter 'model'"):
            read(dtype="auto")
        with pytest.raises(ValueError, match="no parameter 'nonsense'"):
            read(model="/m", nonsense="1")
        with pytest.raises(ValueError, match="expected an integer as parameter 'block_size', got 'x'"):
            read(model="/m", block_size="x")


class TestRequests:
    def test_sampling_parameters_in_three_ways(self) -> None:
        expected = SamplingParams(temperature=0.5, max_tokens=7, stop=["a", "b"], seed=2**64 - 1, ignore_eos=True)
        plain = {"temperature": 0.5, "max_tokens": 7, "seed": 2**64 - 1, "ignore_eos": True}
        texts = {name: str(value) for name, value in plain.items()}
        for request in (
            read_request(
                tensors(text_input="x", stop=["a", "b"]), plain | {"triton_enable_empty_final_response": True}
            ),
            read_request(tensors(text_input="x", sampling_parameters=json.dumps(plain | {"stop": ["a", "b"]})), {}),
            read_request(tensors(text_input="x", sampling_parameters=json.dumps(texts), stop=["a", "b"]), {}),
            read_request(
                tensors(text_input="x", temperature=0.5, max_tokens=7, seed=2**64 - 1, stop_words=["a", "b"]),
                {"ignore_eos": "true"},
            ),
        ):
            assert request.params == expected
            assert (request.prompt, request.stream, request.with_input) == ("x", False, True)

    def test_flags(self) -> None:
        assert not read_request(tensors(text_input="x", stream=True), {}).with_input
        assert not read_request(tensors(text_input="x", exclude_input_in_output=True), {}).with_input
        assert read_request(tensors(input_ids=[3, 4]), {}).prompt == [3, 4]
        request = read_request(tensors(text_input="x", return_logprobs=True, return_finish_reason=False), {})
        assert request.returned == {"logprobs"}
        assert request.params.logprobs == 0
        biased = tensors(text_input="x", sampling_parameters='{"logit_bias": {"5": 1.5}}')
        assert read_request(biased, {}).params.logit_bias == {5: 1.5}

    @pytest.mark.parametrize(
        ("inputs", "parameters", "message"),
        [
            ({}, {}, "text_input, input_ids: expected one of them, got none"),
            ({"max_tokens": 5}, {}, "text_input, input_ids: expected one of them, got none"),
            ({"text_input": "x", "input_ids": [1]}, {}, "expected one of them, got both"),
            ({"text_input": b"\xff"}, {}, "text_input: expected text in UTF-8"),
            ({"text_input": "x", "stop": [b"\xff"]}, {}, "stop: expected text in UTF-8"),
            ({"text_input": "x", "stream": True, "exclude_input_in_output": False}, {}, "exclude_input_in_output: "),
            ({"text_input": "x", "sampling_parameters": "{"}, {}, "sampling_parameters: expected JSON"),
            ({"text_input": "x", "sampling_parameters": "[" * 10**5}, {}, "sampling_parameters: expected JSON"),
            ({"text_input": "x", "sampling_parameters": "[1]"}, {}, "sampling_parameters: expected a JSON object"),
            ({"text_input": "x"}, {"nonsense": 1}, "nonsense: no such sampling parameter"),
            ({"text_input": "x", "temperature": 1}, {"temperature": 1}, "temperature: expected once, came twice"),
            ({"text_input": "x", "stop": ["a"], "stop_words": ["a"]}, {}, "stop: expected once, came twice"),
            ({"text_input": "x"}, {"temperature": "hot"}, "temperature: expected a number"),
            ({"text_input": "x"}, {"ignore_eos": "maybe"}, "ignore_eos: expected true or false"),
            ({"text_input": "x", "sampling_parameters": '{"ignore_eos": null}'}, {}, "ignore_eos: expected true or"),
            ({"text_input": "x", "sampling_parameters": '{"logit_bias": {"a": 1}}'}, {}, "logit_bias: expected a map"),
            ({"text_input": "x", "max_tokens": 0}, {}, "max_tokens: expected a positive integer"),
            ({"text_input": "x", "return_output_ids": True}, {"n": 2}, "return_output_ids: expected one answer"),
        ],
    )
    def test_what_is_wrong(self, inputs: dict[str, Any], parameters: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            read_request(tensors(**inputs), parameters)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), random_model(max_position_embeddings=4096))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_backend())
    for name in ("model", "metrics"):
        monkeypatch.delitem(sys.modules, f"teco_kernels.integrations.triton_server.{name}", raising=False)


def load(path: Path, *, decoupled: bool = True, **options: str) -> Any:
    """A model as the backend makes it."""
    from teco_kernels.integrations.triton_server.model import TritonPythonModel

    parameters = {name: {"string_value": value} for name, value in {"model": str(path), **options}.items()}
    config = {"model_transaction_policy": {"decoupled": decoupled}, "parameters": parameters}
    model = TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_name": "tiny", "model_version": "1"})
    return model


@pytest.fixture
def model(path: Path, backend: None) -> Iterator[Any]:
    model = load(path, max_num_seqs="8")
    yield model
    model.finalize()
    assert model._llm.engine.cache.pool.num_used == 0


def ask(model: Any, _parameters: dict[str, Any] | None = None, **inputs: Any) -> Request:
    request = Request(tensors(**inputs), _parameters or {})
    model.execute([request])
    return request


def error_of(responses: list[InferenceResponse]) -> tuple[str, str]:
    error = responses[-1].error
    assert error is not None
    return error.code, error.message


def outputs_of(response: InferenceResponse) -> dict[str, Any]:
    return {tensor.name(): tensor.values.tolist() for tensor in response.output_tensors}


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_are_those_of_the_loop(path: Path, model: Any) -> None:
    prompts = [f"The capital number {number} of France" for number in range(8)]
    params = SamplingParams(temperature=0, max_tokens=20)
    expected = [output.outputs[0] for output in LLM(path).generate(prompts, params, use_tqdm=False)]
    options = {"temperature": 0, "max_tokens": 20}
    streams = [ask(model, options, text_input=text, stream=True, return_output_ids=True) for text in prompts]
    whole = [ask(model, options, text_input=text) for text in prompts]
    for answer, text, stream, all_at_once in zip(expected, prompts, streams, whole, strict=True):
        parts = [outputs_of(part) for part in stream.wait()]
        assert b"".join(part["text_output"][0] for part in parts).decode() == answer.text
        assert [token for part in parts for token in part["output_ids"]] == answer.token_ids
        assert [response.text() for response in all_at_once.wait()] == [text + answer.text]


def test_everything_that_can_be_returned(model: Any) -> None:
    flags = {f"return_{name}": True for name in OUTPUTS if name != "text_output"}
    ids = tiny_tokenizer().encode(PROMPT).ids
    (response,) = ask(model, {"temperature": 0, "logprobs": 2}, input_ids=ids, max_tokens=3, **flags).wait()
    outputs = outputs_of(response)
    assert outputs.keys() == OUTPUTS.keys()
    assert outputs["text_output"][0].decode().startswith(PROMPT)
    assert outputs["finish_reason"] == [b"length"]
    assert (outputs["num_input_tokens"], outputs["num_output_tokens"]) == ([len(ids)], [3])
    logprobs = json.loads(outputs["logprobs"][0])
    assert [next(iter(entry)) for entry in logprobs] == [str(token) for token in outputs["output_ids"]]
    chosen = [next(iter(entry.values()))["logprob"] for entry in logprobs]
    assert outputs["cumulative_logprob"][0] == pytest.approx(sum(chosen), rel=1e-5)
    for tensor in response.output_tensors:
        assert (
            tensor.values.dtype.name
            in {
                "TYPE_STRING": "object",
                "TYPE_FP32": "float32",
                "TYPE_UINT32": "uint32",
                "TYPE_INT32": "int32",
            }[OUTPUTS[tensor.name()].data_type]
        )


def test_several_answers(model: Any) -> None:
    options = {"n": 3, "seed": 5, "max_tokens": 8}
    (whole,) = ask(model, options, text_input=PROMPT, exclude_input_in_output=True).wait()
    texts = [b""] * 3
    for part in ask(model, options, text_input=PROMPT, stream=True, return_num_output_tokens=True).wait():
        texts = [text + new for text, new in zip(texts, outputs_of(part)["text_output"], strict=True)]
    assert texts == outputs_of(whole)["text_output"]


def test_a_request_that_is_cancelled(model: Any) -> None:
    request = ask(model, {"max_tokens": 4000, "ignore_eos": True}, text_input=PROMPT, stream=True)
    request.responses.get(timeout=30)
    request.cancelled = True
    assert error_of(request.wait()) == ("CANCELLED", "the request was cancelled")
    wait_until(lambda: not model._engine.metrics()["kv_blocks_used"])
    assert model._engine.metrics()["requests_finished"] == {"abort": 1}


def test_one_that_waits_is_cancelled_too(path: Path, backend: None) -> None:
    model = load(path, max_num_seqs="1")
    options = {"max_tokens": 4000, "ignore_eos": True}
    first, second = ask(model, options, text_input=PROMPT), ask(model, options, text_input=PROMPT)
    second.cancelled = True
    assert error_of(second.wait())[0] == "CANCELLED"
    first.cancelled = True
    first.wait()
    model.finalize()


def test_one_that_is_cancelled_before_its_first_step(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = model._start

    def start_and_cancel(generation: Any, sender: Any) -> None:
        start(generation, sender)
        next(task for task, of in model._senders.items() if of is sender).cancel()

    monkeypatch.setattr(model, "_start", start_and_cancel)
    assert error_of(ask(model, text_input=PROMPT).wait())[0] == "CANCELLED"
    wait_until(lambda: not model._senders)


def test_a_server_that_does_not_tell(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next look may find what this one did not."""
    is_cancelled, failures = Request.is_cancelled, [OSError("no memory"), OSError("no memory")]

    def failing(request: Request) -> bool:
        if failures:
            raise failures.pop()
        return is_cancelled(request)

    monkeypatch.setattr(Request, "is_cancelled", failing)
    request = ask(model, {"max_tokens": 4000, "ignore_eos": True}, text_input=PROMPT)
    request.cancelled = True
    assert error_of(request.wait())[0] == "CANCELLED"


def test_errors(path: Path, backend: None) -> None:
    model = load(path, max_concurrent_requests="1", max_num_seqs="1")

    def refused(**inputs: Any) -> tuple[str, str]:
        error = error_of(ask(model, **inputs).wait())
        wait_until(lambda: not model._engine.metrics()["requests_open"])
        return error

    assert refused(text_input="word " * 5000)[0] == "INVALID_ARG"
    assert refused(input_ids=[10**6])[0] == "INVALID_ARG"
    assert refused(text_input="") == ("INVALID_ARG", "prompt: expected at least one token, got none")
    open_one = ask(model, {"max_tokens": 4000, "ignore_eos": True}, text_input=PROMPT)
    wait_until(lambda: model._engine.metrics()["requests_open"])
    assert error_of(ask(model, text_input=PROMPT).wait())[0] == "UNAVAILABLE"
    model._llm.engine.step = lambda: 1 / 0
    code, message = error_of(open_one.wait())
    assert (code, "ZeroDivisionError" in message) == ("INTERNAL", True)
    del model._llm.engine.step
    assert ask(model, text_input=PROMPT).wait()[0].error is None
    model.finalize()


def test_a_model_that_does_not_stream(path: Path, backend: None) -> None:
    model = load(path, decoupled=False)
    code, message = error_of(ask(model, text_input=PROMPT, stream=True).wait())
    assert (code, message) == ("INVALID_ARG", "stream: expected false, or a model that is decoupled; got true")
    assert len(ask(model, text_input=PROMPT).wait()) == 1
    model.finalize()


def test_it_ends_with_requests_that_are_open(path: Path, backend: None) -> None:
    model = load(path)
    requests = [ask(model, {"max_tokens": 4000, "ignore_eos": True}, text_input=PROMPT) for _ in range(3)]
    model.finalize()
    assert {error_of(request.wait())[0] for request in requests} == {"UNAVAILABLE"}
    assert not model._thread.is_alive()


def test_numbers_reach_the_server(model: Any) -> None:
    ask(model, {"ignore_eos": True}, text_input=PROMPT, max_tokens=5).wait()
    families = model._metrics._families

    def value(name: str, **labels: str) -> int:
        return families[name].metrics[json.dumps({"model": "tiny", "version": "1", **labels})].value

    wait_until(lambda: value("generated_tokens") == 5)
    assert value("kv_blocks") > 0
    assert value("kernel_calls", kernel="paged_attention") >= 5 * 3  # steps, layers
    wait_until(lambda: value("kv_blocks_used") == 0)


def test_a_server_without_metrics(path: Path, backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricFamily, "supported", False)
    model = load(path)
    assert ask(model, text_input=PROMPT).wait()[0].error is None
    model.finalize()
