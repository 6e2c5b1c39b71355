"""The HTTP server, by real clients over loopback: what OpenAI's clients get, the metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from http_server import KEY, LONG, PROMPT, let_steps_take, serving, wait_until_free
from tiny_models import tiny_tokenizer

from teco_kernels import LLM, SamplingParams
from teco_kernels.ops import kernel_calls

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_fields_that_ask_for_nothing(server: Any) -> None:
    """What clients send by default; and a variable of the template may have any name."""
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    body |= {"modalities": ["text"], "prompt_cache_key": "a", "safety_identifier": "b", "metadata": {"c": "d"}}
    body |= {"store": False, "service_tier": "auto", "reasoning_effort": "none", "verbosity": "medium"}
    body |= {"function_call": "none", "functions": [], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    body |= {"logit_bias": {"1": -100}, "response_format": {"type": "text"}, "chat_template_kwargs": {"self": 1}}
    body |= {"top_k": None, "min_p": None, "repetition_penalty": None}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


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
