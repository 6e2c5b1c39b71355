"""The HTTP server, by real clients over loopback: both protocols, their errors, and clients that go."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import random_model, save_model, tiny_tokenizer

from teco_kernels import LLM, AsyncEngine, SamplingParams
from teco_kernels.ops import kernel_calls

for _module in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(_module, reason=f"{_module} is not installed: pip install 'teco_kernels[test-serve]'")

import httpx  # noqa: E402
import openai  # noqa: E402
import uvicorn  # noqa: E402

from teco_kernels.integrations.http import Settings, create_app, serve  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "secret"
PROMPT = "The capital of France is"
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}


@contextmanager
def serving(
    llm: LLM, *, max_concurrent_requests: int = 32, limit_concurrency: int | None = None, **settings: Any
) -> Iterator[Any]:
    """A server on a free port of loopback, in a thread."""
    engine = AsyncEngine(llm, max_concurrent_requests=max_concurrent_requests)
    app = create_app(engine, Settings("tiny", **settings))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        options: dict[str, Any] = {"timeout_graceful_shutdown": 2, "limit_concurrency": limit_concurrency}
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as http:
                yield SimpleNamespace(url=url, engine=engine, llm=llm, http=http)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(save_model(tmp_path_factory.mktemp("model"), random_model()), max_num_seqs=8)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Any]:
    with serving(llm, api_key=KEY, max_body_bytes=20_000) as server:
        yield server


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def wait_until_running(server: Any) -> None:
    """A request holds blocks."""
    deadline = time.monotonic() + 30
    while not server.engine.metrics()["kv_blocks_used"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def let_steps_take(seconds: float, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an answer is still being made when the test looks."""
    step = llm.engine.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)


def wait_until_free(server: Any) -> None:
    """No block is held within seconds: far sooner than the requests would have ended."""
    deadline = time.monotonic() + 5
    while server.engine.metrics()["requests_open"] or server.engine.metrics()["kv_blocks_used"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "teco_kernels"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion_is_that_of_the_loop(server: Any, client: openai.OpenAI) -> None:
    params = SamplingParams(n=2, temperature=0.8, seed=7, max_tokens=12, stop=["zz"], logprobs=2)
    answer = client.completions.create(
        model="tiny", prompt=[PROMPT, "Water"], n=2, temperature=0.8, seed=7, max_tokens=12, stop=["zz"], logprobs=2
    )
    assert answer.usage is not None
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    stream = client.completions.create(
        model="tiny",
        prompt=[PROMPT, "Water"],
        n=2,
        temperature=0.8,
        seed=7,
        max_tokens=12,
        stop=["zz"],
        logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, tokens, reasons, usage = [""] * 4, [[] for _ in range(4)], [None] * 4, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in answer.choices]
    assert tokens == [choice.logprobs.token_logprobs for choice in answer.choices if choice.logprobs]
    assert reasons == [choice.finish_reason for choice in answer.choices]
    assert usage.completion_tokens == answer.usage.completion_tokens == sum(map(len, tokens))
    wait_until_free(server)

    async def direct() -> list[str]:
        streams = [await server.engine.add(prompt, params) for prompt in (PROMPT, "Water")]
        return [choice.text for stream in streams for choice in (await stream.last()).outputs]

    assert texts == asyncio.run(direct())


def test_likeliest_tokens_of_one_text(server: Any, client: openai.OpenAI) -> None:
    """Parts of characters have one text; a dictionary can hold the likeliest of them only."""
    params = SamplingParams(seed=1, max_tokens=20, logprobs=5, ignore_eos=True)

    async def direct() -> Any:
        return (await (await server.engine.add(PROMPT, params)).last()).outputs[0].logprobs

    positions = [list(position.values()) for position in asyncio.run(direct())]
    assert any(len({entry.decoded_token for entry in entries}) < len(entries) for entries in positions)
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, seed=1, max_tokens=20, logprobs=5, extra_body={"ignore_eos": True}
    )
    tops = answer.choices[0].logprobs.top_logprobs  # type: ignore[union-attr]
    assert tops is not None
    for top, entries in zip(tops, positions, strict=True):
        texts = {entry.decoded_token for entry in entries}
        assert top == {text: max(e.logprob for e in entries if e.decoded_token == text) for text in texts}


def test_prompts_of_a_list_share_their_steps(server: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    let_steps_take(0.02, llm, monkeypatch)
    before = server.engine.metrics()["steps"]
    prompts = [f"Text {number}" for number in range(8)]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 4, "ignore_eos": True}
    assert len(server.http.post("/v1/completions", json=body).json()["choices"]) == 8
    assert server.engine.metrics()["steps"] - before == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_in_every_chunk(path: str, server: Any) -> None:
    """An option of vLLM's, which load tools set."""
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body |= {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    lines = [line.removeprefix("data: ") for line in server.http.post(path, json=body).text.split("\n\n") if line]
    usages = [json.loads(line)["usage"] for line in lines[:-1]]
    counts = [usage["completion_tokens"] for usage in usages if usage]
    assert counts[-2:] == [5, 5]
    assert counts == sorted(counts)


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    options: Any = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 10}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert answer.usage is not None
    assert len(content) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 and entry.token == entry.top_logprobs[0].token for entry in content)
    text, roles = "", []
    for chunk in client.chat.completions.create(**options, stream=True):
        text += chunk.choices[0].delta.content or ""
        roles.append(chunk.choices[0].delta.role)
    assert text == answer.choices[0].message.content
    assert roles[0] == "assistant"
    options["messages"] = [{"role": "user", "content": "Hello"}]
    assert client.chat.completions.create(**options).choices[0].message.content == text


def test_echo_and_token_ids(client: openai.OpenAI) -> None:
    ids = tiny_tokenizer().encode(PROMPT).ids
    plain = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=4).choices[0].text
    echoed = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=4, echo=True)
    assert echoed.choices[0].text == PROMPT + plain


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


def test_fields_that_ask_for_nothing(server: Any) -> None:
    """What clients send by default; and a variable of the template may have any name."""
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    body |= {"modalities": ["text"], "prompt_cache_key": "a", "safety_identifier": "b", "metadata": {"c": "d"}}
    body |= {"store": False, "service_tier": "auto", "reasoning_effort": "none", "verbosity": "medium"}
    body |= {"function_call": "none", "functions": [], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    body |= {"logit_bias": {"1": -100}, "response_format": {"type": "text"}, "chat_template_kwargs": {"self": 1}}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


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


def test_eight_clients_at_once(server: Any) -> None:
    expected = {}
    for number in range(8):
        body = {"model": "tiny", "prompt": f"Text {number}", "max_tokens": 40, "seed": number}
        expected[number] = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    async def one(number: int) -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            text = ""
            async for chunk in await client.completions.create(
                model="tiny", prompt=f"Text {number}", max_tokens=40, seed=number, stream=True
            ):
                text += chunk.choices[0].text
            return text

    async def main() -> list[str]:
        return await asyncio.gather(*(one(number) for number in range(8)))

    assert asyncio.run(main()) == list(expected.values())
    wait_until_free(server)


def test_our_kernels_answer(server: Any, client: openai.OpenAI) -> None:
    before = kernel_calls("paged_attention")
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True})
    assert kernel_calls("paged_attention") - before == 5 * 3  # steps, layers


def test_metrics(server: Any) -> None:
    server.http.post("/v1/completions", json=LONG | {"max_tokens": 3})
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(server.http.get("/metrics").text)}
    numbers = server.engine.metrics()
    assert families["teco_kernels_kv_blocks"].samples[0].value == numbers["kv_blocks"]
    assert families["teco_kernels_generated_tokens"].samples[0].value == numbers["generated_tokens"]
    assert families["teco_kernels_time_to_first_token_seconds"].type == "histogram"
    assert server.http.get("/kv_cache").json()["held"] == {}


class TestTGI:
    """With TGI's own client."""

    @pytest.fixture
    def tgi(self, server: Any) -> Any:
        text_generation = pytest.importorskip("text_generation", reason="text-generation is not installed")
        return text_generation.Client(server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def test_generate(self, server: Any, tgi: Any) -> None:
        (expected,) = self._direct(server, SamplingParams(temperature=0, max_tokens=12)).outputs
        answer = tgi.generate(PROMPT, max_new_tokens=12, top_n_tokens=2)
        assert answer.generated_text == expected.text
        assert [token.id for token in answer.details.tokens] == expected.token_ids
        assert "".join(token.text for token in answer.details.tokens if not token.special) == expected.text
        assert answer.details.finish_reason.value in ("length", "eos_token")
        assert all(len(top) == 2 for top in answer.details.top_tokens)
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "return_full_text": True}}
        assert server.http.post("/generate", json=body).json() == {"generated_text": PROMPT + expected.text}

    def test_stream(self, server: Any, tgi: Any) -> None:
        events = list(tgi.generate_stream(PROMPT, do_sample=True, seed=5, max_new_tokens=30))
        expected = self._direct(server, SamplingParams(seed=5, max_tokens=30)).outputs[0]
        assert [event.token.id for event in events] == expected.token_ids
        assert "".join(event.token.text for event in events if not event.token.special) == expected.text
        assert events[-1].generated_text == expected.text
        assert events[-1].details.generated_tokens == len(events)
        assert all(event.token.logprob < 0 and event.generated_text is None for event in events[:-1])

    def test_stop_sequence(self, server: Any, tgi: Any) -> None:
        text = self._direct(server, SamplingParams(temperature=0, max_tokens=12)).outputs[0].text
        answer = tgi.generate(PROMPT, max_new_tokens=12, stop_sequences=[text[3:5]])
        assert answer.generated_text == text[: text.index(text[3:5]) + 2]
        assert answer.details.finish_reason.value == "stop_sequence"

    def test_errors(self, server: Any, tgi: Any) -> None:
        errors = pytest.importorskip("text_generation.errors")
        with pytest.raises(errors.ValidationError, match="max_new_tokens"):
            tgi.generate(PROMPT, max_new_tokens=600)
        with pytest.raises(errors.ValidationError, match="must have less than"):
            tgi.generate("word " * 600)
        with pytest.raises(errors.ValidationError, match="typical_p"):
            tgi.generate(PROMPT, typical_p=0.5)
        for parameters in ({"temperature": "hot"}, {"top_p": 1.5}, {"stop": ["a"] * 5}, {"max_new_tokens": 0}):
            answer = server.http.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")

    def test_info_and_tokenize(self, server: Any) -> None:
        info = server.http.get("/info").json()
        assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("tiny", 512, 511)
        tokens = server.http.post("/tokenize", json={"inputs": PROMPT}).json()
        assert [token["id"] for token in tokens] == tiny_tokenizer().encode(PROMPT).ids
        assert "".join(token["text"] for token in tokens) == PROMPT

    def test_tokenize_has_a_limit_and_leaves_the_loop_free(self, server: Any, monkeypatch: Any) -> None:
        too_long = server.http.post("/tokenize", json={"inputs": "word " * 600})
        assert (too_long.status_code, too_long.json()["error_type"]) == (422, "validation")
        threads: list[str] = []
        decode = server.llm.tokenizer.decode

        def noted(*args: Any, **options: Any) -> str:
            threads.append(threading.current_thread().name)
            return str(decode(*args, **options))

        monkeypatch.setattr(server.llm.tokenizer, "decode", noted)
        assert server.http.post("/tokenize", json={"inputs": PROMPT}).status_code == 200
        assert threads
        assert all(name.startswith("asyncio") for name in threads)  # not the loop's own

    def test_sampling_and_seeds(self, server: Any) -> None:
        """A temperature of 1 alone does not sample, as in TGI; a seed that was drawn is told, and gives the answer."""

        def ask(**parameters: Any) -> tuple[str, int | None]:
            parameters = {"max_new_tokens": 12, "details": True, **parameters}
            answer = server.http.post("/generate", json={"inputs": PROMPT, "parameters": parameters}).json()
            return answer["generated_text"], answer["details"]["seed"]

        greedy = self._direct(server, SamplingParams(temperature=0, max_tokens=12)).outputs[0].text
        assert ask() == ask(temperature=1.0) == ask(seed=3) == (greedy, None)
        for sampling in ({"do_sample": True}, {"temperature": 1.5}, {"top_k": 50}, {"top_p": 0.9}):
            text, seed = ask(**sampling)
            assert seed is not None
            assert ask(**sampling, seed=seed) == (text, seed)
            assert ask(**sampling)[1] != seed

    @staticmethod
    def _direct(server: Any, params: SamplingParams) -> Any:
        async def answer() -> Any:
            return await (await server.engine.add(PROMPT, params)).last()

        return asyncio.run(answer())


def test_the_page_in_a_browser(llm: LLM, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium was found")
    with (
        serving(llm) as server,
        playwright.sync_playwright() as play,
        play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if server.url not in request.url else None)
        page.goto(server.url)
        page.click("#go")
        page.locator("#speed", has_text="tokens/s").wait_for(timeout=20_000)
        page.locator("#cache i").first.wait_for(timeout=20_000)
        expected = server.http.post(
            "/v1/completions", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
        ).json()["choices"][0]["text"]
        assert page.evaluate("document.getElementById('answer').textContent") == expected
        page.screenshot(path=tmp_path / "page.png")
        assert not problems


def test_failed_engine_is_unhealthy(llm: LLM, monkeypatch: Any) -> None:
    from teco_kernels.parallel import CommunicatorError

    def lost() -> Any:
        raise CommunicatorError("rank 1 has ended")

    monkeypatch.setattr(llm.engine, "step", lost)
    with serving(llm) as server:
        assert server.http.post("/v1/completions", json=LONG).status_code == 503
        health = server.http.get("/health")
        assert (health.status_code, health.json()["error"]) == (503, "unhealthy: rank 1 has ended")
