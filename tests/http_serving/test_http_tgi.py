"""The HTTP server's dialect of TGI, by TGI's own client over loopback."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from http_server import KEY, PROMPT
from tiny_models import tiny_tokenizer

from teco_kernels import CompletionOutput, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tgi(server: Any) -> Any:
    text_generation = pytest.importorskip("text_generation", reason="text-generation is not installed")
    return text_generation.Client(server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)


def answer_of(server: Any, params: SamplingParams) -> CompletionOutput:
    """The loop's own, without HTTP."""

    async def answer() -> CompletionOutput:
        return (await (await server.engine.add(PROMPT, params)).last()).outputs[0]

    return asyncio.run(answer())


def test_generate(server: Any, tgi: Any) -> None:
    expected = answer_of(server, SamplingParams(temperature=0, max_tokens=12))
    answer = tgi.generate(PROMPT, max_new_tokens=12, top_n_tokens=2)
    assert answer.generated_text == expected.text
    assert [token.id for token in answer.details.tokens] == expected.token_ids
    assert "".join(token.text for token in answer.details.tokens if not token.special) == expected.text
    assert answer.details.finish_reason.value in ("length", "eos_token")
    assert all(len(top) == 2 for top in answer.details.top_tokens)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "return_full_text": True}}
    assert server.http.post("/generate", json=body).json() == {"generated_text": PROMPT + expected.text}


def test_stream(server: Any, tgi: Any) -> None:
    events = list(tgi.generate_stream(PROMPT, do_sample=True, seed=5, max_new_tokens=30))
    expected = answer_of(server, SamplingParams(seed=5, max_tokens=30))
    assert [event.token.id for event in events] == expected.token_ids
    assert "".join(event.token.text for event in events if not event.token.special) == expected.text
    assert events[-1].generated_text == expected.text
    assert events[-1].details.generated_tokens == len(events)
    assert all(event.token.logprob < 0 and event.generated_text is None for event in events[:-1])


def test_stop_sequence(server: Any, tgi: Any) -> None:
    text = answer_of(server, SamplingParams(temperature=0, max_tokens=12)).text
    answer = tgi.generate(PROMPT, max_new_tokens=12, stop_sequences=[text[3:5]])
    assert answer.generated_text == text[: text.index(text[3:5]) + 2]
    assert answer.details.finish_reason.value == "stop_sequence"


def test_errors(server: Any, tgi: Any) -> None:
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


def test_info_and_tokenize(server: Any) -> None:
    info = server.http.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("tiny", 512, 511)
    tokens = server.http.post("/tokenize", json={"inputs": PROMPT}).json()
    assert [token["id"] for token in tokens] == tiny_tokenizer().encode(PROMPT).ids
    assert "".join(token["text"] for token in tokens) == PROMPT


def test_tokenize_has_a_limit_and_leaves_the_loop_free(server: Any, monkeypatch: Any) -> None:
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


def test_sampling_and_seeds(server: Any) -> None:
    """A temperature of 1 alone does not sample, as in TGI; a seed that was drawn is told, and gives the answer."""

    def ask(**parameters: Any) -> tuple[str, int | None]:
        parameters = {"max_new_tokens": 12, "details": True, **parameters}
        answer = server.http.post("/generate", json={"inputs": PROMPT, "parameters": parameters}).json()
        return answer["generated_text"], answer["details"]["seed"]

    greedy = answer_of(server, SamplingParams(temperature=0, max_tokens=12)).text
    assert ask() == ask(temperature=1.0) == ask(seed=3) == (greedy, None)
    for sampling in ({"do_sample": True}, {"temperature": 1.5}, {"top_k": 50}, {"top_p": 0.9}):
        text, seed = ask(**sampling)
        assert seed is not None
        assert ask(**sampling, seed=seed) == (text, seed)
        assert ask(**sampling)[1] != seed
