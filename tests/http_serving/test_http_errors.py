"""What the HTTP server says to bad requests, and what becomes of it where clients go and steps fail."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from http_server import KEY, LONG, PROMPT, let_steps_take, serving, wait_until_free, wait_until_running

from teco_kernels import LLM, AsyncEngine
from teco_kernels.integrations.http import Settings, serve

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("completions", {"temperature": "hot"}, "temperature"),
        ("completions", {"temperature": 3}, "temperature"),
        ("completions", {"n": True}, "n"),
        ("completions", {"n": 9}, "n"),
        ("completions", {"prompt": 5}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[10**6]]}, "prompt"),
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("completions", {"nonsense": 1}, "nonsense"),
        ("completions", {"no\ud800sense": 1}, None),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"logprobs": 6}, "logprobs"),
        ("completions", {"logprobs": 1, "echo": True}, "echo"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"stop": ["a"] * 5}, "stop"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"1": 100.5}}, "logit_bias"),
        ("completions", {"top_p": 0}, "top_p"),
        ("completions", {"prompt": "word " * 600}, "prompt"),
        ("completions", {"max_tokens": 511}, "prompt"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"chat_template_kwargs": {"messages": []}}, None),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"service_tier": "flex"}, "service_tier"),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat/completions", {"verbosity": "low"}, "verbosity"),
        ("chat/completions", {"function_call": {"name": "f"}}, "function_call"),
        ("chat/completions", {"web_search_options": {}}, "web_search_options"),
    ],
)
def test_openai_errors(path: str, change: dict[str, Any], param: str | None, server: Any) -> None:
    body: dict[str, Any] = {"model": "tiny"}
    if path == "completions":
        body["prompt"] = PROMPT
    else:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    text = json.dumps(body | change)
    answer = server.http.post(f"/v1/{path}", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    wait_until_free(server)


def test_logits_that_are_not_numbers_are_the_servers_failure(server: Any) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "repetition_penalty": 1e-300}
    answer = server.http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    body = {"inputs": PROMPT, "parameters": {"repetition_penalty": 1e-300}}
    answer = server.http.post("/generate", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")


def test_openai_client_raises_what_the_server_says(server: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt=PROMPT)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny", prompt=PROMPT * 200)
    assert too_long.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b"[" * 5000, b'{"model": NaN}', b"\xff\xfe{}"])
@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_bodies_that_are_not_json(path: str, content: bytes, server: Any) -> None:
    answer = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == (400 if path.startswith("/v1/") else 422), answer.text
    assert answer.json()["error"]


def test_keys_sizes_and_paths(server: Any) -> None:
    for path in ("/v1/models", "/metrics", "/kv_cache", "/info"):
        assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(server.url + path, headers={"Authorization": "Bearer sécret".encode()}).status_code == 401
        assert server.http.get(path).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/").status_code == 200
    assert httpx.post(f"{server.url}/", json={"inputs": PROMPT}).status_code == 401
    too_long = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 30_000})
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (413, "body_too_long")
    chunked = server.http.post("/v1/completions", content=(b"x" * 1000 for _ in range(30)))
    assert chunked.status_code == 413
    assert server.http.get("/nowhere").status_code == 404
    wrong_method = server.http.get("/v1/completions")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    for host in ("elsewhere.example", "elsewhere.example:80", "localhost.elsewhere.example"):
        refused = server.http.get("/v1/models", headers={"Host": host})
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "invalid_request_error")
    assert httpx.get(f"{server.url}/health", headers={"Host": "LOCALHOST:1"}).status_code == 200
    assert httpx.head(f"{server.url}/").status_code == 200
    assert httpx.get(f"{server.url}/info", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    assert httpx.get(f"{server.url}/info", headers={"Authorization": f"Basic {KEY}"}).status_code == 401
    assert httpx.get(f"{server.url}/v1/health").status_code == 401
    assert server.http.get("/openapi.json").status_code == 404


def test_a_body_that_does_not_come(llm: LLM) -> None:
    with serving(llm, body_seconds=0.3) as server:
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=10) as connection:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            answer = b"".join(iter(lambda: connection.recv(1000), b""))  # up to its end: the connection is closed
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"expected it within 0.3 s" in answer


def test_connections_have_a_limit(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    with monkeypatch.context() as patched:
        patched.setattr(uvicorn, "run", lambda app, **options: given.update(options))
        serve(AsyncEngine(llm), Settings("tiny", max_connections=2))
    with serving(llm, limit_concurrency=given["limit_concurrency"]) as server:
        address = "127.0.0.1", httpx.URL(server.url).port
        with socket.create_connection(address):
            assert server.http.get("/health").status_code == 200
            with socket.create_connection(address):
                deadline = time.monotonic() + 10  # it may be accepted after a request that was sent later
                while server.http.get("/health").status_code != 503:
                    assert time.monotonic() < deadline


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_client_that_goes_frees_its_blocks(path: str, stream: bool, llm: LLM, monkeypatch: Any) -> None:
    let_steps_take(0.05, llm, monkeypatch)  # all of the answer would take 20 seconds
    body: dict[str, Any] = {"inputs": PROMPT, "parameters": {"max_new_tokens": 480}}
    if path == "/v1/completions":
        body = LONG | {"stream": stream}
    elif path == "/v1/chat/completions":
        messages = [{"role": "user", "content": "Hello"}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 480, "ignore_eos": True, "stream": stream}
    elif stream:
        path = "/generate_stream"
    with serving(llm) as server:
        if stream:
            with server.http.stream("POST", path, json=body) as answer:
                lines = answer.iter_lines()  # which ends the request when it is collected
                next(lines)
                wait_until_running(server)
        else:
            with pytest.raises(httpx.ReadTimeout):
                server.http.post(path, json=body, timeout=0.5)
        wait_until_free(server)
        assert server.http.get("/health").status_code == 200


def test_the_queue_is_full(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    let_steps_take(0.05, llm, monkeypatch)
    with serving(llm, max_concurrent_requests=1) as server:
        with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            encoded: list[str] = []  # no work is done for what is turned away
            monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **options: encoded.append(text))
            refused = server.http.post("/v1/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
            assert server.http.post("/v1/chat/completions", json=chat).status_code == 429
            refused = server.http.post("/generate", json={"inputs": PROMPT})
            assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
            assert encoded == []
        wait_until_free(server)
        assert "teco_kernels_requests_refused_total 3.0" in server.http.get("/metrics").text


def test_a_step_that_fails_in_the_middle(llm: LLM, monkeypatch: Any) -> None:
    step, failing = llm.engine.step, []

    def failing_step() -> Any:
        if failing:
            raise ArithmeticError(failing.pop())
        return step()

    monkeypatch.setattr(llm.engine, "step", failing_step)
    with serving(llm) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**options, stream=True)
        next(iter(stream))
        failing.append("a wrong sum")
        with pytest.raises(openai.APIError, match="a wrong sum"):
            list(stream)
        failing.append("a wrong sum")
        with pytest.raises(openai.InternalServerError, match="a wrong sum"):
            client.completions.create(**options)
        failing.append("a wrong sum")
        answer = server.http.post("/generate", json={"inputs": PROMPT})
        assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2).choices


def test_failed_engine_is_unhealthy(llm: LLM, monkeypatch: Any) -> None:
    from teco_kernels.parallel import CommunicatorError

    def lost() -> Any:
        raise CommunicatorError("rank 1 has ended")

    monkeypatch.setattr(llm.engine, "step", lost)
    with serving(llm) as server:
        assert server.http.post("/v1/completions", json=LONG).status_code == 503
        health = server.http.get("/health")
        assert (health.status_code, health.json()["error"]) == (503, "unhealthy: rank 1 has ended")
