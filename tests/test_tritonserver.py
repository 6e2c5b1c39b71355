"""The real Triton Inference Server over our model: `make test-tritonserver`, in an environment that has it."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from teco_kernels import LLM, SamplingParams

for _module in ("pytriton", "tritonclient"):
    if find_spec(_module) is None:
        pytest.skip(f"{_module} is not installed here; `make test-tritonserver`", allow_module_level=True)

import numpy as np  # noqa: E402
import tritonclient.grpc as grpcclient  # noqa: E402
import tritonclient.grpc.aio as aiogrpcclient  # noqa: E402
import tritonclient.http as httpclient  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

pytestmark = pytest.mark.model
COMMAND = Path(sys.executable).with_name("teco-kernels")
PROMPTS = [
    f"{text} " for text in ("Water boils at", "A cat is", "Paris is", "In 1969", "The sun", "def f(x):", "1, 2,")
]
PROMPTS.append("The capital of France is")
TOKENS = 24
LONG = {"max_tokens": 7000, "ignore_eos": True, "temperature": 0}  # which takes far longer than the tests wait


@pytest.fixture(scope="module")
def server(model_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server on free ports, with the model twice: one that streams, and one that gives one response."""
    repository = tmp_path_factory.mktemp("triton") / "repository"
    for name, *options in (
        ("streaming", "--max-num-seqs", "8"),
        ("single", "--no-decoupled", "--max-concurrent-requests", "8", "--recycle-head", "none"),
    ):
        command = [COMMAND, "triton-repository", model_4bit, repository, "--name", name, *options]
        subprocess.run(command, check=True, capture_output=True)
    ports = free_ports(3)
    command = [COMMAND, "triton-server", repository]
    for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{kind}-port", str(port)]
    log = repository.with_name("log")
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--", "--log-verbose=0"], stdout=output, stderr=output)
    try:
        client = httpclient.InferenceServerClient(f"127.0.0.1:{ports[0]}", concurrency=8)
        deadline = time.monotonic() + 300
        while not is_ready(client):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield SimpleNamespace(
            http=f"127.0.0.1:{ports[0]}", grpc=f"127.0.0.1:{ports[1]}", metrics=f"127.0.0.1:{ports[2]}", client=client
        )
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()[-3000:]
        assert "successfully unloaded 'streaming'" in log.read_text()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def expected(model_4bit: Path) -> list[str]:
    """Greedy answers of the loop."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    return [output.outputs[0].text for output in LLM(model_4bit).generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(autouse=True)
def still_there(server: Any) -> Iterator[None]:
    """After each test the server holds no blocks, and answers."""
    yield
    wait_until_free(server)
    status, body = post(server, "streaming/generate", {"text_input": "One, two,", "max_tokens": 3, "temperature": 0})
    assert (status, body["text_output"]) == (200, "One, two, three, four")


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def is_ready(client: Any) -> bool:
    try:
        return bool(client.is_server_ready())
    except OSError:
        return False


def post(server: Any, path: str, body: Any) -> tuple[int, Any]:
    """Of the `generate` extension, which Triton's client has no calls for."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{server.http}/v2/models/{path}", content)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read().removeprefix(b"data: "))


def events(server: Any, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of `generate_stream`; dropping them closes the connection."""
    connection = http.client.HTTPConnection(server.http, timeout=60)
    connection.request("POST", "/v2/models/streaming/generate_stream", json.dumps(body | {"stream": True}))
    answer = connection.getresponse()
    try:
        for line in answer:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))
    finally:
        answer.close()
        connection.close()


def metric(server: Any, name: str, **labels: str) -> float:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    wanted = "".join(rf'(?=[^}}]*{key}="{value}")' for key, value in labels.items())
    (value,) = re.findall(rf"^teco_kernels_{name}{{{wanted}[^}}]*}} (\S+)", text, re.MULTILINE)
    return float(value)


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_free(server: Any) -> None:
    """No block is held within seconds: far sooner than `LONG` would have ended."""
    for model in ("streaming", "single"):
        wait_until(lambda model=model: metric(server, "kv_blocks_used", model=model) == 0)


def inputs(client: Any, **values: Any) -> list[Any]:
    """Tensors as `tritonclient` sends them."""
    kinds = {
        str: ("BYTES", np.object_),
        bool: ("BOOL", np.bool_),
        int: ("INT32", np.int32),
        float: ("FP32", np.float32),
    }
    made = []
    for name, value in values.items():
        many = value if isinstance(value, list) else [value]
        data_type, kind = kinds[type(many[0])]
        texts = [one.encode() if isinstance(one, str) else one for one in many]
        made.append(client.InferInput(name, [len(many)], data_type))
        made[-1].set_data_from_numpy(np.array(texts, dtype=kind))
    return made


def text_of(result: Any) -> str:
    return str(result.as_numpy("text_output")[0].decode())


def test_eight_grpc_streams_at_once(server: Any, expected: list[str]) -> None:
    async def one(client: Any, text: str) -> str:
        async def requests() -> Any:
            yield {
                "model_name": "streaming",
                "inputs": inputs(grpcclient, text_input=text, stream=True, max_tokens=TOKENS, temperature=0.0),
            }

        parts = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            parts.append(text_of(result))
        assert len(parts) > 1
        return "".join(parts)

    async def main() -> list[str]:
        clients = [aiogrpcclient.InferenceServerClient(server.grpc) for _ in PROMPTS]
        try:
            return await asyncio.gather(*map(one, clients, PROMPTS))
        finally:
            await asyncio.gather(*(client.close() for client in clients))

    assert asyncio.run(main()) == expected


def test_eight_http_streams_at_once(server: Any, expected: list[str]) -> None:
    def one(text: str) -> str:
        body = {"text_input": text, "parameters": {"max_tokens": TOKENS, "temperature": 0}}
        return "".join(event["text_output"] for event in events(server, body))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, PROMPTS)) == expected


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_eight_plain_requests_at_once(protocol: str, server: Any, expected: list[str]) -> None:
    client = httpclient if protocol == "http" else grpcclient

    def one(text: str) -> str:
        sampling = json.dumps({"temperature": "0", "max_tokens": str(TOKENS)})  # as the client of vLLM's model sends it
        tensors = inputs(client, text_input=text, exclude_input_in_output=True, sampling_parameters=sampling)
        with client.InferenceServerClient(getattr(server, protocol)) as connection:
            return text_of(connection.infer("single", tensors))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, PROMPTS)) == expected


def test_our_kernels_answer(server: Any) -> None:
    def calls(kernel: str) -> float:
        return metric(server, "kernel_calls_total", model="single", kernel=kernel)

    def settled(kernel: str) -> float:
        """The server tells its numbers a few times a second: those of the requests before may still be to come."""
        seen = [calls(kernel)]
        while len(seen) < 2 or seen[-1] != seen[-2]:
            time.sleep(2)
            seen.append(calls(kernel))
        return seen[-1]

    before = settled("paged_attention"), settled("gptq_matmul")
    tensors = inputs(httpclient, input_ids=[504, 3575, 282], max_tokens=5, return_num_output_tokens=True)
    tensors += inputs(httpclient, sampling_parameters='{"ignore_eos": true}')
    answer = server.client.infer("single", tensors)
    assert answer.as_numpy("num_output_tokens").tolist() == [5]
    wait_until(lambda: calls("paged_attention") - before[0] == 5 * 30)  # steps, layers
    assert calls("gptq_matmul") > before[1]


def test_a_grpc_client_that_cancels(server: Any) -> None:
    responses: SimpleQueue[Any] = SimpleQueue()
    client = grpcclient.InferenceServerClient(server.grpc)
    client.start_stream(lambda result, error: responses.put((result, error)))
    sampling = json.dumps(LONG)
    tensors = inputs(grpcclient, text_input=PROMPTS[0], stream=True, sampling_parameters=sampling)
    client.async_stream_infer("streaming", tensors)
    assert responses.get(timeout=30)[1] is None
    wait_until(lambda: metric(server, "kv_blocks_used", model="streaming") > 0)
    client.stop_stream(cancel_requests=True)
    wait_until_free(server)


def test_a_grpc_client_whose_time_is_over(server: Any) -> None:
    tensors = inputs(grpcclient, text_input=PROMPTS[0], sampling_parameters=json.dumps(LONG))
    with (
        grpcclient.InferenceServerClient(server.grpc) as client,
        pytest.raises(InferenceServerException, match="Deadline Exceeded"),
    ):
        client.infer("single", tensors, client_timeout=2)
    wait_until_free(server)


def test_an_http_client_that_goes(server: Any) -> None:
    stream = events(server, {"text_input": PROMPTS[0], **LONG})
    next(stream)
    wait_until(lambda: metric(server, "kv_blocks_used", model="streaming") > 0)
    stream.close()
    wait_until_free(server)


def test_the_queue_is_full(server: Any) -> None:
    refused = metric(server, "requests_refused_total", model="single")
    tensors = inputs(grpcclient, text_input=PROMPTS[0], sampling_parameters=json.dumps(LONG))
    with grpcclient.InferenceServerClient(server.grpc) as client:
        calls = [client.async_infer("single", tensors, lambda result, error: None) for _ in range(8)]
        wait_until(lambda: metric(server, "requests_open", model="single") == 8)
        with pytest.raises(InferenceServerException, match="max_concurrent_requests") as caught:
            server.client.infer("single", inputs(httpclient, text_input="x"))
        assert caught.value.status() == "503"
        for call in calls:
            call.cancel()
        wait_until_free(server)
    assert metric(server, "requests_refused_total", model="single") == refused + 1


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("streaming/generate", b'{"text_input": ', 500, "failed to parse the request JSON"),
        ("streaming/generate", b"\xff", 500, "failed to parse the request JSON"),
        ("streaming/generate", {}, 400, "text_input, input_ids: expected one of them, got none"),
        ("streaming/generate", {"text_input": 5}, 500, "attempt to access JSON non-string"),
        ("streaming/generate", {"text_input": "x", "nonsense": 1}, 400, "nonsense: no such sampling parameter"),
        ("streaming/generate", {"text_input": "x", "temperature": -1}, 400, "temperature: expected a number"),
        ("streaming/generate", {"text_input": "word " * 9000}, 400, "prompt: expected fewer tokens than"),
        ("streaming/generate_stream", {"text_input": "word " * 9000}, 400, "prompt: expected fewer tokens than"),
        ("streaming/generate", {"input_ids": [10**6]}, 400, "prompt: expected token ids from 0 to"),
        ("single/generate_stream", {"text_input": "x", "stream": True}, 400, "stream: expected false"),
        ("none/generate", {"text_input": "x"}, 404, "unknown model: 'none'"),
    ],
)
def test_http_errors(path: str, body: Any, status: int, message: str, server: Any) -> None:
    code, answer = post(server, path, body)
    assert (code, message in answer["error"]) == (status, True), answer


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "text_input, input_ids: expected one of them, got none"),
        ({"max_tokens": 3}, "text_input, input_ids: expected one of them, got none"),
        ({"text_output": "x"}, "unexpected inference input 'text_output'"),
        ({"text_input": ["x", "y"]}, "unexpected shape for input 'text_input'"),
        ({"text_input": 5}, "data-type is 'INT32', but model 'single' expects 'BYTES'"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens: expected a positive integer"),
        ({"text_input": "x", "sampling_parameters": "{"}, "sampling_parameters: expected JSON"),
        ({"text_input": "word " * 9000}, "prompt: expected fewer tokens than max_model_len, 8192"),
    ],
)
def test_errors_of_plain_requests(protocol: str, values: dict[str, Any], message: str, server: Any) -> None:
    client = httpclient if protocol == "http" else grpcclient
    with client.InferenceServerClient(getattr(server, protocol)) as connection:
        with pytest.raises(InferenceServerException, match=message) as caught:
            connection.infer("single", inputs(client, **values))
        assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_an_error_in_a_stream_leaves_the_stream(server: Any, expected: list[str]) -> None:
    responses: SimpleQueue[Any] = SimpleQueue()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer("streaming", inputs(grpcclient, text_input="x", temperature=-1.0))
        _, error = responses.get(timeout=30)
        assert "temperature: expected a number" in str(error)
        options = {"exclude_input_in_output": True, "max_tokens": TOKENS, "temperature": 0.0}
        client.async_stream_infer("streaming", inputs(grpcclient, text_input=PROMPTS[0], **options))
        result, error = responses.get(timeout=30)
        assert (error, text_of(result)) == (None, expected[0])
