"""The loop as a whole: whatever the company, the cache and the chunks, a request gets the tokens it gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import END, VOCAB_SIZE, random_model, save_model, tiny_tokenizer

from teco_kernels import LLM, RequestOutput, SamplingParams
from teco_kernels.decoder import engine as engine_module
from teco_kernels.decoder.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
END_ID = tiny_tokenizer().token_to_id(END)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), random_model())


def load(path: Path, num_blocks: int = 512, block_size: int = 16, **options: Any) -> LLM:
    """A model whose cache has so many blocks."""
    kv_cache_dtype = options.pop("kv_cache_dtype", "fp32")
    slot_bytes = {"fp32": 64 * 4, "bf16": 64 * 2, "int8": 64 + 16, "fp8": 64 + 16}[kv_cache_dtype] * 3
    options = {"max_model_len": 512, "kv_cache_memory": num_blocks * block_size * slot_bytes, **options}
    llm = LLM(path, block_size=block_size, kv_cache_dtype=kv_cache_dtype, **options)
    assert llm.metrics()["kv_blocks"] == num_blocks
    return llm


def random_requests(count: int, *, longest: int, seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of mixed lengths, some with a common beginning; parameters of every kind, all with a decided outcome."""
    draw = random.Random(seed)
    common = [draw.randrange(END_ID) for _ in range(longest // 2)]
    requests = []
    for number in range(count):
        length = min(1 + int(draw.expovariate(3 / longest)), longest)
        prompt = [draw.randrange(END_ID) for _ in range(length)]
        if draw.random() < 0.3:
            prompt = common[: draw.randrange(len(common))] + prompt[:8]
        params: dict[str, Any] = {"max_tokens": min(1 + int(draw.expovariate(3 / longest)), longest)}
        match number % 5:
            case 0 | 1:
                params["temperature"] = 0.0
            case 2:
                params |= {"seed": number, "top_p": 0.9, "top_k": 50}
            case 3:
                params |= {"seed": number, "temperature": 2.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5}
            case 4:
                params |= {"seed": number, "n": 3, "ignore_eos": True, "logprobs": 1, "stop": "t"}
        requests.append((prompt, SamplingParams(**params)))
    return requests


def answers(outputs: list[RequestOutput]) -> list[Any]:
    return [
        [(answer.token_ids, answer.text, answer.finish_reason, answer.logprobs) for answer in output.outputs]
        for output in outputs
    ]


def each_alone(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    return [answers(llm.generate(prompt, params, use_tqdm=False))[0] for prompt, params in requests]


def together(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    prompts, params = [prompt for prompt, _ in requests], [params for _, params in requests]
    return answers(llm.generate(prompts, params, use_tqdm=False))


@pytest.mark.parametrize(("kv_cache_dtype", "count"), [("fp32", 100), ("bf16", 40), ("int8", 40), ("fp8", 40)])
def test_every_request_gets_the_tokens_it_gets_alone(kv_cache_dtype: str, count: int, path: Path) -> None:
    requests = random_requests(count, longest=90)
    alone = each_alone(load(path, kv_cache_dtype=kv_cache_dtype), requests)
    preemptions = 0
    for budget, block_size in ((7, 8), (64, 5), (300, 16)):
        llm = load(
            path,
            num_blocks=320 // block_size,
            block_size=block_size,
            kv_cache_dtype=kv_cache_dtype,
            max_num_seqs=24,
            max_num_batched_tokens=budget,
        )
        assert together(llm, requests) == alone
        assert llm.engine.cache.pool.num_used == 0
        preemptions += llm.metrics()["preemptions"]
    assert preemptions > 10


def test_number_of_threads_does_not_matter(path: Path) -> None:
    requests = random_requests(6, longest=20)
    llm = load(path)
    expected = together(llm, requests)
    torch.set_num_threads(3)
    assert together(load(path), requests) == expected
    torch.set_num_threads(1)
    assert together(llm, requests) == expected


def test_prefix_cache_changes_nothing_but_the_work(path: Path) -> None:
    llm = load(path)
    prompt = [number % 90 for number in range(100)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (cold,) = llm.generate(prompt, params, use_tqdm=False)
    (warm,) = llm.generate(prompt, params, use_tqdm=False)
    assert (cold.metrics.num_cached_tokens, warm.metrics.num_cached_tokens) == (0, 96)
    assert answers([warm]) == answers([cold])
    # The conversation goes on: blocks that were filled while answering are known as well.
    longer = prompt + cold.outputs[0].token_ids + [5, 6, 7, 8, 9]
    (onward,) = llm.generate(longer, params, use_tqdm=False)
    assert onward.metrics.num_cached_tokens == 96
    fresh = load(path).generate(longer, params, use_tqdm=False)
    assert answers([onward]) == answers(fresh)
    metrics = llm.metrics()
    assert metrics["prefix_cache_hit_tokens"] == 192
    assert metrics["prefix_cache_queried_tokens"] == 100 + 100 + 113


def test_answers_to_one_prompt_share_its_blocks(path: Path) -> None:
    llm = load(path)
    stream = llm.stream(list(range(50)), SamplingParams(n=8, seed=0, max_tokens=4, ignore_eos=True))
    next(stream)
    assert llm.metrics()["kv_blocks_used"] == 4  # 50 tokens, once
    next(stream)
    assert llm.metrics()["kv_blocks_used"] == 3 + 8  # the half-filled block was copied on writing
    list(stream)
    assert llm.metrics()["kv_blocks_used"] == 0


def test_kv_waste_is_below_four_percent_for_lengths_like_real_ones(path: Path) -> None:
    """Half a block per sequence: of a few hundred tokens that is 2 to 3 %."""
    llm = load(path, num_blocks=300, max_num_seqs=16)
    draw = random.Random(1)
    lengths = [min(max(int(draw.lognormvariate(5.2, 0.7)), 20), 400) for _ in range(40)]
    prompts = [[draw.randrange(END_ID) for _ in range(length)] for length in lengths]
    params = [SamplingParams(temperature=0, max_tokens=draw.randrange(40, 110), ignore_eos=True) for _ in prompts]
    llm.generate(prompts, params, use_tqdm=False)
    waste = llm.metrics()["kv_waste_share"]
    assert 0.005 < waste < 0.04


def test_waste_share_counts_slots(path: Path) -> None:
    """By hand: one sequence of 3 tokens that grows to 6, in blocks of 4; the last token never gets a slot."""
    llm = load(path, block_size=4)
    llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    unused, allocated = 1 + 0 + 3 + 2, 4 + 4 + 8 + 8
    assert llm.metrics()["kv_waste_share"] == unused / allocated
    assert llm.metrics()["steps"] == 4


def test_waste_share_counts_a_shared_block_once(path: Path) -> None:
    """Eight answers to six tokens, six tokens a step: in the second step two still share the half-filled block."""
    llm = load(path, block_size=4, max_num_batched_tokens=6)
    params = SamplingParams(n=8, seed=0, max_tokens=2, ignore_eos=True)
    llm.generate([1, 2, 3, 4, 5, 6], params, use_tqdm=False)
    unused, blocks = 2 + (6 * 1 + 2) + 2 * 1, 2 + (1 + 6 + 1) + (1 + 2)
    assert llm.metrics()["kv_waste_share"] == unused / (4 * blocks)


def collect(stream: Iterator[RequestOutput]) -> list[RequestOutput]:
    return list(stream)


def test_streams_read_in_turn_get_what_each_gets_alone(path: Path) -> None:
    llm = load(path, num_blocks=12, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [[1, 2, 3, 4, 5], [200, 100], [7] * 9]
    alone = each_alone(load(path), [(prompt, params) for prompt in prompts])
    streams = {number: llm.stream(prompt, params) for number, prompt in enumerate(prompts)}
    last: dict[int, RequestOutput] = {}
    texts = dict.fromkeys(streams, "")
    while streams:
        for number, stream in list(streams.items()):
            output = next(stream, None)
            if output is None:
                del streams[number]
                continue
            last[number] = output
            texts[number] += output.outputs[0].new_text
    assert answers([last[number] for number in range(3)]) == alone
    assert all(texts[number] == last[number].outputs[0].text for number in range(3))
    assert llm.metrics()["preemptions"] > 0
    assert llm.metrics()["kv_blocks_used"] == 0


def test_outputs_of_a_stream_do_not_change_afterwards(path: Path) -> None:
    llm = load(path)
    outputs = collect(llm.stream([1, 2], SamplingParams(temperature=0, max_tokens=5, logprobs=1, ignore_eos=True)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5]
    assert [len(output.outputs[0].logprobs or ()) for output in outputs] == [1, 2, 3, 4, 5]
    assert [output.finished for output in outputs] == [False] * 4 + [True]


def test_generate_serves_a_stream_that_is_open(path: Path) -> None:
    llm = load(path)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (alone,) = llm.generate([1, 2, 3], params, use_tqdm=False)
    stream = llm.stream([1, 2, 3], params)
    next(stream)
    llm.generate([9, 9], params, use_tqdm=False)
    assert answers([collect(stream)[-1]]) == answers([alone])


def test_a_dropped_stream_frees_its_blocks(path: Path) -> None:
    llm = load(path)
    stream = llm.stream([1, 2, 3], SamplingParams(n=2, seed=0, max_tokens=50, ignore_eos=True))
    next(stream)
    next(stream)
    assert llm.metrics()["kv_blocks_used"] > 0
    assert llm.metrics()["requests_running"] == 2
    del stream
    assert llm.metrics()["kv_blocks_used"] == 0
    assert llm.metrics()["requests_running"] == 0
    never_started = llm.stream([1, 2, 3])
    del never_started
    assert not llm.engine.has_unfinished_requests


def test_an_aborted_stream_does_not_wait_for_ever(path: Path) -> None:
    llm = load(path)
    stream = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    llm.engine.abort_request(next(stream).request_id)
    with pytest.raises(RuntimeError, match="a request was aborted behind the back of the call that waits for it"):
        next(stream)
    assert not llm.engine.has_unfinished_requests


def run(engine: Engine) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests:
        last |= {output.request_id: output for output in engine.step()}
    return last


def test_abort_at_any_time(path: Path) -> None:
    """Waiting, half computed, answering, preempted: the others do not notice and no block is left over."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = {str(number): [number] * (4 + 5 * number) for number in range(6)}
    alone = {key: each_alone(load(path), [(prompt, params)])[0] for key, prompt in prompts.items()}
    for after in range(0, 40, 3):
        engine = load(path, num_blocks=12, block_size=4, max_num_batched_tokens=8, max_num_seqs=3).engine
        for key, prompt in prompts.items():
            engine.add_request(key, prompt, params)
        seen: dict[str, RequestOutput] = {}
        for _ in range(after):
            seen |= {output.request_id: output for output in engine.step()}
        for key in ("1", "4", "unknown"):
            engine.abort_request(key)
        seen |= run(engine)
        for key in ("0", "2", "3", "5"):
            assert answers([seen[key]])[0] == alone[key]
        assert engine.cache.pool.num_used == 0
        assert engine.metrics()["requests_running"] == engine.metrics()["requests_waiting"] == 0


def test_a_step_that_failed_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops it (here as if by Ctrl-C), the next request is answered as ever, an open stream goes on."""
    llm = load(path, num_blocks=16, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    requests = [([1, 2, 3, 4, 5], params), ([6] * 9, params)]
    alone = each_alone(llm, requests)
    stream = llm.stream([6] * 9, params)
    next(stream)
    compute, steps = llm.engine.runner.compute, iter(range(100))

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return compute(*args, **options)

    monkeypatch.setattr(llm.engine.runner, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([1, 2, 3, 4, 5], params, use_tqdm=False)
    assert together(llm, requests) == alone
    assert answers([collect(stream)[-1]])[0] == alone[1]
    assert llm.engine.cache.pool.num_used == 0


@pytest.mark.parametrize("num_prompt", [5, 8])  # a block filled in part, and one that is in the prefix index already
def test_a_step_that_failed_before_it_had_sampled_is_made_up_for(
    num_prompt: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(path, num_blocks=32, block_size=4)
    requests = [(list(range(num_prompt)), SamplingParams(n=2, seed=0, max_tokens=9, ignore_eos=True, logprobs=1))]
    requests += [([7] * length, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)) for length in (3, 4, 6)]
    alone = each_alone(load(path), requests)
    real, calls = engine_module.sample_tokens, iter(range(1000))

    def failing(*args: Any) -> list[int]:
        if next(calls) % 3 == 0:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(engine_module, "sample_tokens", failing)
    for number, (prompt, params) in enumerate(requests):
        llm.engine.add_request(str(number), prompt, params)
    last: dict[str, RequestOutput] = {}
    failures = 0
    while llm.engine.has_unfinished_requests:
        try:
            last |= {output.request_id: output for output in llm.engine.step()}
        except MemoryError:
            failures += 1
    assert failures >= 3
    assert answers([last[str(number)] for number in range(len(requests))]) == alone
    assert llm.engine.cache.pool.num_used == 0


def test_scoring_beside_running_requests(path: Path) -> None:
    llm = load(path, num_blocks=8, block_size=4)
    alone = llm.score([1, 2, 3, 4, 5, 6])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (expected,) = llm.generate([1, 2, 3], params, use_tqdm=False)
    stream = llm.stream([1, 2, 3], params)
    next(stream)
    assert llm.score([1, 2, 3, 4, 5, 6]) == alone
    with pytest.raises(ValueError, match="token_ids: 32 tokens need 8 KV blocks, 7 are available"):
        llm.score([1] * 32)
    assert answers([collect(stream)[-1]]) == answers([expected])


def test_metrics_count(path: Path) -> None:
    llm = load(path)
    outputs = llm.generate([[1, 2, 3], [4, 5]], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    metrics = llm.metrics()
    assert metrics["prompt_tokens"] == 5
    assert metrics["generated_tokens"] == sum(len(output.outputs[0].token_ids) for output in outputs)
    assert metrics["kv_blocks_peak"] == 2
    assert metrics["kv_cache_bytes"] == sum(layer.key.nbytes + layer.value.nbytes for layer in llm.engine.cache.layers)
    # Embedding and head, then q, k, v, o, gate, up, down of three layers, all fp32.
    layer = 64 * (64 + 32 + 32 + 64 + 96 + 96 + 96)
    assert metrics["weight_bytes"] == 4 * (2 * VOCAB_SIZE * 64 + 3 * layer)
    for output in outputs:
        times = output.metrics
        assert times.first_token_time is not None
        assert times.finished_time is not None
        assert times.arrival_time <= times.first_token_time <= times.finished_time
