"""The engine behind an event loop: the same tokens, blocks freed at once, errors where they belong, a free loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, save_model

from teco_kernels import LLM, AsyncEngine, RequestOutput, SamplingParams
from teco_kernels.decoder import EngineClosedError, QueueFullError, RequestError, StepError
from teco_kernels.ops import paged_attention
from teco_kernels.parallel import CommunicatorError

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), random_model())


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    llm = LLM(path, max_num_seqs=8)
    yield llm
    assert llm.engine.cache.pool.num_used == 0
    assert not llm.engine.has_unfinished_requests


async def blocks_free(engine: AsyncEngine) -> None:
    """Wait for commands that were sent before."""
    assert await engine.call(lambda engine: engine.cache.pool.num_used) == 0
    assert engine.metrics()["requests_open"] == 0


def slow(llm: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Let each step take a while."""
    step = llm.engine.step

    def slow_step() -> list[RequestOutput]:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)


def let_fail(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Errors that are put into the list are raised by the next steps."""
    step, errors = llm.engine.step, list[Exception]()

    def failing_step() -> list[RequestOutput]:
        if errors:
            raise errors.pop()
        return step()

    monkeypatch.setattr(llm.engine, "step", failing_step)
    return errors


def test_the_same_tokens_as_without_it(llm: LLM) -> None:
    prompts = [f"The capital number {i} of France" for i in range(20)]
    params = [SamplingParams(max_tokens=20, seed=i, n=1 + i % 3, temperature=0.0 if i % 2 else 1.0) for i in range(20)]
    expected = llm.generate(prompts, params, use_tqdm=False)

    async def answer(engine: AsyncEngine, number: int) -> list[tuple[str, list[int]]]:
        texts = [""] * params[number].n
        async for output in await engine.add(prompts[number], params[number]):
            for answer in output.outputs:
                texts[answer.index] += answer.new_text
        assert output.finished
        assert texts == [answer.text for answer in output.outputs]
        return [(answer.text, answer.token_ids) for answer in output.outputs]

    async def main() -> list[Any]:
        async with AsyncEngine(llm) as engine:
            return await asyncio.gather(*(answer(engine, number) for number in range(20)))

    got = asyncio.run(main())
    assert got == [[(answer.text, answer.token_ids) for answer in output.outputs] for output in expected]


def test_abort_frees_the_blocks_at_once(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            stream = await engine.add("one", LONG, request_id="mine")
            other = await engine.add("another text", LONG)
            await anext(stream)
            await anext(other)
            held = await engine.call(lambda engine: engine.held_blocks())
            assert set(held) == {"mine", other.request_id}
            await engine.abort("mine")
            assert set(await engine.call(lambda engine: engine.held_blocks())) == {other.request_id}
            await engine.abort("mine")
            await engine.abort("nobody's")
            rest = [output async for output in stream]
            assert rest[-1].finished
            assert rest[-1].outputs[0].finish_reason == "abort"
            await other.aclose()
            await blocks_free(engine)
            assert [output async for output in other] == []

    asyncio.run(main())


@pytest.mark.parametrize("way", ["cancel", "leave", "drop", "time out"])
def test_a_consumer_that_goes_takes_its_request_along(way: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(llm, monkeypatch)

    async def read(engine: AsyncEngine) -> None:
        async with await engine.add("text", LONG) as stream:
            async for _ in stream:
                if way == "leave":
                    return

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            if way == "drop":
                stream = await engine.add("text", LONG)
                await anext(stream)
                del stream
                gc.collect()
            elif way == "leave":
                await read(engine)
            elif way == "time out":
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(read(engine), 0.2)
            else:
                task = asyncio.create_task(read(engine))
                await asyncio.sleep(0.2)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await blocks_free(engine)

    asyncio.run(main())


def test_a_request_that_is_cancelled_while_it_is_taken_in(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(llm, monkeypatch, 0.3)

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            running = await engine.add("text", LONG)
            task = asyncio.create_task(engine.add("late", LONG))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await running.aclose()
            await blocks_free(engine)

    asyncio.run(main())


def test_the_queue_has_a_limit(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm, max_concurrent_requests=3) as engine:
            streams = [await engine.add("text", LONG) for _ in range(3)]
            with pytest.raises(QueueFullError, match="at most 3 requests"):
                await engine.add("text", LONG)
            await streams[0].aclose()
            await (await engine.add("text", SamplingParams(max_tokens=2))).last()
            assert engine.metrics()["requests_refused"] == 1
            for stream in streams:
                await stream.aclose()
            await blocks_free(engine)

    asyncio.run(main())


def test_several_requests_are_taken_in_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the same two steps, all of them or none."""
    slow(llm, monkeypatch)
    params = SamplingParams(max_tokens=4, ignore_eos=True)

    async def main() -> None:
        async with AsyncEngine(llm, max_concurrent_requests=8) as engine:
            streams = engine.reserve(8)
            with pytest.raises(QueueFullError):
                engine.reserve()
            before = engine.metrics()["steps"]
            await engine.start(streams, [[1, number] for number in range(7)] + ["text"], params)
            await asyncio.gather(*(stream.last() for stream in streams))
            assert engine.metrics()["steps"] - before == 4
            with pytest.raises(QueueFullError):
                engine.reserve(9)
            streams = engine.reserve(8)
            with pytest.raises(ValueError, match="token ids from 0"):
                await engine.start(streams, [[1]] * 7 + [[10**6]], LONG)
            await blocks_free(engine)
            assert engine.metrics()["requests_finished"] == {"length": 8}
            assert engine.metrics()["requests_refused"] == 1 + 9
            (unused,) = engine.reserve()
            await unused.aclose()
            await blocks_free(engine)

    asyncio.run(main())


def test_requests_that_can_never_be_answered(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            bad: list[tuple[Any, SamplingParams, type[Exception], str]] = [
                ("", LONG, ValueError, "at least one token"),
                ([1] * 600, LONG, ValueError, "max_model_len"),
                ([10**6], LONG, ValueError, "token ids from 0"),
                ("text", SamplingParams(n=9), ValueError, "max_num_seqs"),
                ("\ud800", LONG, ValueError, "Unicode"),
                ({"text": "text"}, LONG, TypeError, "prompt_token_ids"),
            ]
            for prompt, params, kind, message in bad:
                with pytest.raises(kind, match=message):
                    await engine.add(prompt, params)
            async with await engine.add("text", LONG, request_id="twice") as stream:
                with pytest.raises(ValueError, match="already in use"):
                    await engine.add("text", LONG, request_id="twice")
                await anext(stream)  # which has not noticed
            await blocks_free(engine)

    asyncio.run(main())


def test_a_step_that_fails_is_told_to_every_stream(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = let_fail(llm, monkeypatch)

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            streams = [await engine.add("text", LONG) for _ in range(4)]
            errors.append(ArithmeticError("a wrong sum"))
            for error in await asyncio.gather(*(stream.last() for stream in streams), return_exceptions=True):
                assert isinstance(error, StepError)
                assert "a wrong sum" in str(error)
                assert isinstance(error.__cause__, ArithmeticError)
            await blocks_free(engine)
            assert engine.metrics()["requests_finished"] == {"error": 4}
            assert engine.failure is None
            assert (await (await engine.add("text", SamplingParams(max_tokens=3))).last()).finished

    asyncio.run(main())


def test_a_rank_that_is_lost_ends_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = let_fail(llm, monkeypatch)

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            stream = await engine.add("text", LONG)
            errors.append(CommunicatorError("rank 1 has ended"))
            with pytest.raises(EngineClosedError) as caught:
                await stream.last()
            assert isinstance(caught.value.__cause__, CommunicatorError)
            assert isinstance(engine.failure, CommunicatorError)
            with pytest.raises(EngineClosedError, match="rank 1 has ended"):
                await engine.add("text", LONG)

    asyncio.run(main())


def test_a_request_that_fails_alone(llm: LLM) -> None:
    # Logits divided by this are infinite in fp32.
    bias = SamplingParams(max_tokens=4, repetition_penalty=1e-300, logit_bias={1: 3e38})

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            other = await engine.add("text", SamplingParams(max_tokens=50, ignore_eos=True))
            with pytest.raises(RequestError, match="finite logits"):
                await (await engine.add("text", bias)).last()
            assert len((await other.last()).outputs[0].token_ids) == 50
            await blocks_free(engine)

    asyncio.run(main())


def test_closing_ends_streams_and_the_thread(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncEngine(llm)
        stream = await engine.add("text", LONG)
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineClosedError, match="was closed"):
            await stream.last()
        with pytest.raises(EngineClosedError, match="was closed"):
            await engine.add("text", LONG)
        await stream.aclose()
        await engine.close()

    threads = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == threads
    assert llm.generate("text", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished  # free again


def test_an_engine_that_is_forgotten_ends_its_thread(llm: LLM) -> None:
    engine = AsyncEngine(llm)
    thread = engine._thread
    assert thread.is_alive()
    del engine
    gc.collect()
    assert not thread.is_alive()


def test_a_loop_that_ends_with_a_stream_open(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(llm, monkeypatch)
    engine = AsyncEngine(llm)
    kept = []

    async def leave() -> None:
        kept.append(await engine.add("text", LONG))
        await anext(kept[0])

    asyncio.run(leave())
    deadline = time.monotonic() + 10
    while engine.metrics()["requests_open"] and time.monotonic() < deadline:
        time.sleep(0.01)
    asyncio.run(blocks_free(engine))
    asyncio.run(engine.close())


def test_the_loop_is_free_while_a_step_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of about a second is part of it: the loop would wait for all of it, if that held the interpreter."""
    query, keys = torch.randn(1536, 32, 128), torch.randn(1, 1536, 32, 128)
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([1536], dtype=torch.int32)
    starts = torch.tensor([0, 1536], dtype=torch.int32)
    step, durations = llm.engine.step, []

    def long_step() -> list[RequestOutput]:
        start = time.monotonic()
        paged_attention(query, keys, keys, table, length, starts)
        durations.append(time.monotonic() - start)
        return step()

    monkeypatch.setattr(llm.engine, "step", long_step)

    async def main() -> float:
        async with AsyncEngine(llm) as engine:
            stream = await engine.add("text", SamplingParams(max_tokens=2, ignore_eos=True))
            task, longest = asyncio.create_task(stream.last()), 0.0
            while not task.done():
                start = time.monotonic()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - start)
            return longest

    longest = asyncio.run(main())
    assert min(durations) > 0.1
    assert longest < min(durations) / 2


def test_a_slow_consumer_gets_several_steps_in_one(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            stream = await engine.add("text", SamplingParams(max_tokens=100, ignore_eos=True, n=2, seed=1))
            while engine.metrics()["requests_finished"].get("length", 0) == 0:
                await asyncio.sleep(0.01)
            outputs = [output async for output in stream]
            assert len(outputs) == 1
            assert [answer.new_text for answer in outputs[0].outputs] == [answer.text for answer in outputs[0].outputs]

    asyncio.run(main())


def test_metrics(llm: LLM) -> None:
    async def main() -> dict[str, Any]:
        async with AsyncEngine(llm) as engine:
            assert engine.metrics()["time_to_first_token_seconds_count"] == 0
            for _ in range(3):
                await (await engine.add([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))).last()
            await (await engine.add([1, 2, 3], LONG)).aclose()
            await blocks_free(engine)
            buckets = engine.statistics.histograms["request_generated_tokens"].cumulative()
            assert buckets[-1] == (float("inf"), 4)
            assert dict(buckets)[5.0] >= 3
            return engine.metrics()

    metrics = asyncio.run(main())
    assert metrics["requests_finished"] == {"length": 3, "abort": 1}
    assert metrics["prompt_tokens"] == 12
    assert metrics["request_prompt_tokens_sum"] == 12
    assert metrics["time_to_first_token_seconds_count"] in (3, 4)
    assert metrics["time_per_output_token_seconds_count"] in (3, 4)
    assert metrics["request_seconds_sum"] >= metrics["time_to_first_token_seconds_sum"] > 0
    assert metrics["kv_blocks_used"] == 0


@pytest.mark.parametrize("value", [0, True, 1.5, None])
def test_max_concurrent_requests_must_be_a_positive_integer(value: Any, llm: LLM) -> None:
    with pytest.raises(ValueError, match="max_concurrent_requests: expected a positive integer"):
        AsyncEngine(llm, max_concurrent_requests=value)


def test_callers_of_other_threads(llm: LLM) -> None:
    """Loops of several threads may share an engine."""
    engine = AsyncEngine(llm)
    results: list[str] = []

    async def answer() -> str:
        return (await (await engine.add("text", SamplingParams(max_tokens=8, seed=3))).last()).outputs[0].text

    def work() -> None:
        results.append(asyncio.run(answer()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1
    asyncio.run(engine.close())


def test_call_gives_its_error_to_the_caller(llm: LLM) -> None:
    def divide(_: Any) -> float:
        return 1 / 0

    async def main(function: Callable[[Any], float]) -> None:
        async with AsyncEngine(llm) as engine:
            with pytest.raises(ZeroDivisionError):
                await engine.call(function)
            assert engine.failure is None

    asyncio.run(main(divide))
