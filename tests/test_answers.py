"""What a request can ask of its answer: where it stops, how its tokens are chosen, what is reported of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import END, VOCAB_SIZE, random_model, reference_logits, save_model, tiny_tokenizer

from teco_kernels import LLM, CompletionOutput, SamplingParams
from teco_kernels.decoder.answer import Answer
from teco_kernels.decoder.sampler import sample_tokens
from teco_kernels.decoder.scheduler import Sequence
from teco_kernels.decoder.tokenizer import Detokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "The capital of France"
END_ID = tiny_tokenizer().token_to_id(END)
#: Leaves only tokens of plain text, so that every token adds to the text at once.
PLAIN = {
    token: -100.0
    for token in range(VOCAB_SIZE)
    if not tiny_tokenizer().decode([token], skip_special_tokens=True).isascii() or token >= END_ID
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def llm(model: Any, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = save_model(tmp_path_factory.mktemp("model"), model)
    return LLM(path, max_model_len=128, kv_cache_memory=1 << 20)


def answer(llm: LLM, prompt: str | list[int] = PROMPT, **params: Any) -> CompletionOutput:
    (output,) = llm.generate(prompt, SamplingParams(**{"temperature": 0.0, **params}), use_tqdm=False)
    assert llm.metrics()["kv_blocks_used"] == 0
    return output.outputs[0]


def test_length_and_context_end_an_answer(llm: LLM) -> None:
    assert len(answer(llm).token_ids) == 16
    assert answer(llm, max_tokens=5).finish_reason == "length"
    prompt_length = len(llm.tokenizer.encode(PROMPT))
    whole = answer(llm, max_tokens=None, ignore_eos=True)
    assert len(whole.token_ids) == 128 - prompt_length
    assert whole.finish_reason == "length"
    assert len(answer(llm, max_tokens=5000, ignore_eos=True).token_ids) == 128 - prompt_length


def test_end_of_sequence_token(llm: LLM) -> None:
    bias = {END_ID: 100.0}
    ended = answer(llm, logit_bias=bias)
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([END_ID], "", "stop", None)
    ignored = answer(llm, logit_bias=bias, ignore_eos=True, max_tokens=4)
    assert ignored.token_ids == [END_ID] * 4
    assert ignored.finish_reason == "length"
    assert answer(llm, logit_bias=bias, ignore_eos=True, max_tokens=2, skip_special_tokens=False).text == END * 2


def test_stop_token(llm: LLM) -> None:
    tokens = answer(llm, logit_bias=PLAIN).token_ids
    stop = tokens[6]
    first = tokens.index(stop)
    stopped = answer(llm, logit_bias=PLAIN, stop_token_ids=[stop])
    assert stopped.token_ids == tokens[: first + 1]
    assert stopped.text == llm.tokenizer.decode(tokens[:first])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    included = answer(llm, logit_bias=PLAIN, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert included.text == llm.tokenizer.decode(tokens[: first + 1])


def test_every_piece_of_the_text_can_stop_it(llm: LLM) -> None:
    """Also one that begins within a token, spans several, or shares its beginning with what comes before it."""
    full = answer(llm, logit_bias=PLAIN)
    for start in range(len(full.text)):
        for length in (1, 2, 3, 5, 9):
            stop = full.text[start : start + length]
            stopped = answer(llm, logit_bias=PLAIN, stop=["never in it", stop])
            assert stopped.text == full.text[: full.text.index(stop)]
            assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
            assert stopped.token_ids == full.token_ids[: len(stopped.token_ids)]
    included = answer(llm, logit_bias=PLAIN, stop=full.text[3:6], include_stop_str_in_output=True)
    assert included.text == full.text[: full.text.index(full.text[3:6]) + 3]


def test_stream_never_shows_a_part_of_a_stop_string(llm: LLM) -> None:
    full = answer(llm, logit_bias=PLAIN)
    for stop in ([full.text[5:12]], [full.text[5:12] + "\0", full.text[8:9]], [full.text[-4:] + "more"]):
        params = SamplingParams(temperature=0, logit_bias=PLAIN, stop=stop)
        expected, shown = answer(llm, logit_bias=PLAIN, stop=stop), ""
        for output in llm.stream(PROMPT, params):
            shown += output.outputs[0].new_text
            assert shown == output.outputs[0].text
            assert expected.text.startswith(shown)
        assert shown == expected.text


def test_min_tokens_holds_back_every_kind_of_stop(llm: LLM) -> None:
    held = answer(llm, logit_bias={END_ID: 100.0}, min_tokens=5)
    assert len(held.token_ids) == 6
    assert held.token_ids.index(END_ID) == 5
    full = answer(llm, logit_bias=PLAIN)
    stop = full.token_ids[2]
    assert stop not in answer(llm, logit_bias=PLAIN, stop_token_ids=[stop], min_tokens=8).token_ids[:8]
    late = answer(llm, logit_bias=PLAIN, stop=list(set(full.text)), min_tokens=9)
    assert late.text
    assert late.text == full.text[: len(late.text)]
    assert len(late.token_ids) == 9


def test_penalties_are_those_of_the_formula(llm: LLM, model: Any) -> None:
    """Step by step against transformers' logits, changed by hand."""
    params = {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.3}
    bias = {5: 1.5, 9: -2.0}
    prompt = llm.tokenizer.encode(PROMPT)
    got = answer(llm, **params, logit_bias=bias, ignore_eos=True, max_tokens=24).token_ids
    logits = reference_logits(model, prompt + got)[len(prompt) - 1 : -1]
    for step, row in enumerate(logits):
        for token in set(prompt + got[:step]):
            row[token] *= 1.3 if row[token] < 0 else 1 / 1.3
        for token in got[:step]:
            row[token] -= 0.9
        for token in set(got[:step]):
            row[token] -= 0.7
        for token, value in bias.items():
            row[token] += value
        assert got[step] == int(row.argmax())
    assert got != answer(llm, ignore_eos=True, max_tokens=24).token_ids


def test_bias_can_force_and_forbid(llm: LLM) -> None:
    free = answer(llm, ignore_eos=True).token_ids
    forbidden = answer(llm, ignore_eos=True, logit_bias=dict.fromkeys(free, -1000.0)).token_ids
    assert not set(free) & set(forbidden)
    assert answer(llm, logit_bias={65: 1000.0}).token_ids == [65] * 16
    assert answer(llm, logit_bias={65: 1000}, temperature=1.0, seed=1).token_ids == [65] * 16


def test_logprobs_are_the_models(llm: LLM, model: Any) -> None:
    prompt = llm.tokenizer.encode(PROMPT)
    output = answer(llm, temperature=1.5, seed=3, logprobs=4, ignore_eos=True, frequency_penalty=1.0)
    expected = reference_logits(model, prompt + output.token_ids)[len(prompt) - 1 : -1].log_softmax(-1)
    assert output.logprobs is not None
    for token, row, logprobs in zip(output.token_ids, expected, output.logprobs, strict=True):
        top = row.topk(4).indices.tolist()
        assert set(logprobs) == {token, *top}
        for likely, entry in logprobs.items():
            assert entry.logprob == pytest.approx(row[likely].item(), abs=1e-4)
            assert entry.rank == 1 + int((row > row[likely]).sum())
            assert entry.decoded_token == llm.tokenizer.decode([likely], skip_special_tokens=False)
    chosen = sum(row[token].item() for token, row in zip(output.token_ids, expected, strict=True))
    assert output.cumulative_logprob == pytest.approx(chosen, abs=1e-3)
    only = answer(llm, logprobs=0).logprobs
    assert only is not None
    assert all(len(entry) == 1 for entry in only)
    assert answer(llm).logprobs is None


def test_seeds_decide_and_company_does_not(llm: LLM) -> None:
    def drawn(**params: Any) -> list[int]:
        return answer(llm, **{"temperature": 1.0, "ignore_eos": True, **params}).token_ids

    assert drawn(seed=1) == drawn(seed=1)
    assert len({tuple(drawn(seed=seed)) for seed in range(8)}) == 8
    assert len(set(drawn(seed=1, temperature=1e6))) > 10  # nearly uniform: every token has a random number of its own
    assert drawn() != drawn()  # 16 tokens: the chance to be equal is nil
    params = SamplingParams(n=3, seed=5, ignore_eos=True)
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    answers = [completion.token_ids for completion in output.outputs]
    assert answers[0] == drawn(seed=5)
    assert len(set(map(tuple, answers))) == 3
    assert [completion.index for completion in output.outputs] == [0, 1, 2]


def test_filters_reach_the_sampler(llm: LLM, model: Any) -> None:
    greedy = answer(llm, ignore_eos=True).token_ids
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert answer(llm, **{"temperature": 1.0, "seed": 9, "ignore_eos": True, **narrow}).token_ids == greedy
    prompt = llm.tokenizer.encode(PROMPT)
    likeliest = reference_logits(model, prompt)[-1].topk(3).indices.tolist()
    firsts = {answer(llm, temperature=5.0, top_k=3, seed=seed, max_tokens=1).token_ids[0] for seed in range(60)}
    assert firsts == set(likeliest)


def test_text_is_that_of_the_tokens_whatever_they_are(llm: LLM) -> None:
    """Random tokens make random bytes: characters of several bytes, broken and whole, over borders of tokens."""
    for seed in range(30):
        output = answer(llm, temperature=5.0, seed=seed, max_tokens=40, ignore_eos=True)
        assert output.text == llm.tokenizer.decode(output.token_ids)


def test_characters_of_several_tokens_arrive_whole(llm: LLM) -> None:
    text = "é東🙂"
    tokens = tiny_tokenizer().encode(text).ids
    assert len(tokens) > len(text)
    detokenizer = Detokenizer(llm.tokenizer, context=tiny_tokenizer().encode("a").ids)
    pieces = [detokenizer.push([token]) for token in tokens]
    assert "".join(pieces) == text
    assert set("".join(pieces)) == set(text)


def test_penalties_reach_unlikely_tokens_too(llm: LLM) -> None:
    """Greedy answers show only what happens to the largest logits; here all of them are looked at."""
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, min_tokens=9)
    params = replace(params, logit_bias={3: -2.0}, stop_token_ids=[8])
    sequence = Sequence([1, 2, 2, 3, 4, 3, 3], num_prompt=3, max_tokens=16, seed=0)
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    expected = logits[0].clone()
    assert expected[:5].lt(0).any()
    for token in (1, 2, 3, 4):
        expected[token] *= 1.5 if expected[token] < 0 else 1 / 1.5
    expected[3] -= 0.5 + 3 * 0.25 + 2.0
    expected[4] -= 0.5 + 0.25
    expected[[8, END_ID]] = -torch.inf
    sample_tokens(logits, [Answer(0, sequence, params, llm.tokenizer)])
    torch.testing.assert_close(logits[0], expected)


def test_score_is_the_models(llm: LLM, model: Any) -> None:
    tokens = torch.randint(0, VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = reference_logits(model, tokens).log_softmax(-1)
    expected = logits[:-1].gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(llm.score(tokens)), expected, rtol=0, atol=1e-4)
    cut = llm.score(tokens, window=41)
    assert len(cut) == 99
    assert cut[:40] == llm.score(tokens)[:40]
    assert cut[40:80] == llm.score(tokens[40:81])
    limit = llm.engine.scheduler.max_num_batched_tokens
    llm.engine.scheduler.max_num_batched_tokens = 13
    assert llm.score(tokens, window=41) == cut
    llm.engine.scheduler.max_num_batched_tokens = limit
    text = "The capital of Germany"
    assert llm.score(text) == llm.score(llm.tokenizer.encode(text))
    assert llm.score([1]) == llm.score([]) == []
    assert llm.metrics()["kv_blocks_used"] == 0


def test_score_cuts_its_windows_to_what_the_cache_holds(llm: LLM, tmp_path: Path) -> None:
    tokens = torch.randint(0, VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    path = save_model(tmp_path, random_model())
    small = LLM(path, max_model_len=128, block_size=4, kv_cache_memory=10 * 3072)
    assert small.metrics()["kv_blocks"] == 10
    assert small.score(tokens) == llm.score(tokens, window=40)


def test_prompts_as_vllm_writes_them(llm: LLM) -> None:
    params = SamplingParams(temperature=0)
    token_ids = llm.tokenizer.encode(PROMPT)
    expected = answer(llm).token_ids
    prompts: list[Any] = [{"prompt": PROMPT}, {"prompt_token_ids": token_ids}, PROMPT, token_ids]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [expected] * 4
    assert [output.prompt for output in outputs] == [PROMPT, None, PROMPT, None]
    assert llm.generate({"prompt_token_ids": token_ids}, params, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    token_ids = llm.chat_prompt(messages)
    assert token_ids == llm.tokenizer.encode("<|user|>Hello<|end|><|assistant|>")
    assert llm.chat_prompt(messages, add_generation_prompt=False) == token_ids[:-1]
    for variables in ({"add_generation_prompt": False}, {"chat_template_kwargs": {"add_generation_prompt": False}}):
        (plain,) = llm.chat(messages, use_tqdm=False, **variables)  # type: ignore[arg-type]
        assert plain.prompt_token_ids == token_ids[:-1]
    params = SamplingParams(temperature=0)
    (one,) = llm.chat(messages, params, use_tqdm=False)
    many = llm.chat([messages, messages], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in many] == [one.outputs[0].token_ids] * 2
    assert one.prompt_token_ids == token_ids
