"""OpenAI's protocol: ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from teco_kernels.decoder.async_engine import AsyncEngine, Stream
from teco_kernels.decoder.sampling_params import CompletionOutput, Logprob, RequestOutput, SamplingParams
from teco_kernels.integrations.http.errors import ApiError, as_api_error
from teco_kernels.integrations.http.openai_requests import ChatRequest, CompletionRequest, GenerationRequest
from teco_kernels.integrations.http.settings import Settings
from teco_kernels.integrations.http.streaming import Events, event, finished, merged, reserved, unless_disconnected

_REASONS = {"stop": "stop", "length": "length"}


class OpenAIRoutes:
    """The endpoints.

    Parameters
    ----------
    engine : AsyncEngine
    settings : Settings
    """

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._created = int(time.time())
        self.router = APIRouter(prefix="/v1")
        self.router.add_api_route("/models", self.models, methods=["GET"], response_model=None)
        self.router.add_api_route("/models/{name:path}", self.model, methods=["GET"], response_model=None)
        self.router.add_api_route("/completions", self.completions, methods=["POST"], response_model=None)
        self.router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)

    async def models(self) -> dict[str, Any]:
        """The one model that there is."""
        return {"object": "list", "data": [await self.model(self._settings.model_name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """A model by name."""
        self._check_model(name)
        length = self._engine.llm.engine.max_model_len
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "teco_kernels",
            "max_model_len": length,
        }

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Go on from prompts."""
        self._check_model(body.model)
        params = body.params()
        texts = body.prompts()
        if not 1 <= len(texts) <= self._engine.max_concurrent_requests:
            limit = self._engine.max_concurrent_requests
            raise ApiError(400, f"prompt: expected 1 to {limit} prompts, got {len(texts)}", param="prompt")
        with reserved(self._engine, len(texts)) as streams:
            prompts = await self._encode_all(texts)
            self._check_lengths(prompts, params, "prompt", body.max_tokens)
            await self._engine.start(streams, prompts, params)
        head = self._head("cmpl", "text_completion")
        echoes = [""] * len(prompts)
        if body.echo:
            decode = self._engine.tokenizer.decode
            echoes = [text if isinstance(text, str) else decode(text) for text in texts]
        if body.stream:
            return Events(self._completion_events(head, streams, body, params, echoes), streams)
        outputs = await unless_disconnected(request, finished(streams))
        if isinstance(outputs, Response):
            return outputs
        choices = [
            {
                "index": number * params.n + answer.index,
                "text": echoes[number] + answer.text,
                "logprobs": _completion_logprobs(answer, 0, 0),
                "finish_reason": _REASONS.get(answer.finish_reason or ""),
            }
            for number, output in enumerate(outputs)
            for answer in output.outputs
        ]
        return JSONResponse({**head, "choices": choices, "usage": _usage(outputs)})

    async def _completion_events(
        self,
        head: dict[str, Any],
        streams: Sequence[Stream],
        body: CompletionRequest,
        params: SamplingParams,
        echoes: list[str],
    ) -> AsyncIterator[str]:
        offsets: dict[int, int] = {}

        def choice(number: int, answer: CompletionOutput, start: int) -> dict[str, Any]:
            index = number * params.n + answer.index
            text = answer.new_text
            if index not in offsets:
                text = echoes[number] + text
            logprobs = _completion_logprobs(answer, start, offsets.get(index, 0))
            offsets[index] = offsets.get(index, 0) + sum(map(len, logprobs["tokens"] if logprobs else ()))
            reason = _REASONS.get(answer.finish_reason or "")
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

        async for text in self._events(head, streams, body, choice):
            yield text

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check_model(body.model)
        params = body.params()
        messages = [message.plain() for message in body.messages]
        if clash := {"messages", "add_generation_prompt"} & body.chat_template_kwargs.keys():
            raise ApiError(400, f"chat_template_kwargs: {clash.pop()!r} is set by the server")
        variables = {"add_generation_prompt": body.add_generation_prompt, **body.chat_template_kwargs}
        with reserved(self._engine, 1) as streams:
            prompt = await asyncio.to_thread(partial(self._engine.llm.chat_prompt, messages, **variables))
            self._check_lengths([prompt], params, "messages", params.max_tokens)
            await self._engine.start(streams, [prompt], params)
        head = self._head("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion")
        if body.stream:
            return Events(self._chat_events(head, streams, body, params), streams)
        outputs = await unless_disconnected(request, finished(streams))
        if isinstance(outputs, Response):
            return outputs
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": _chat_logprobs(answer, 0, body.top_logprobs or 0),
                "finish_reason": _REASONS.get(answer.finish_reason or ""),
            }
            for answer in outputs[0].outputs
        ]
        return JSONResponse({**head, "choices": choices, "usage": _usage(outputs)})

    async def _chat_events(
        self, head: dict[str, Any], streams: Sequence[Stream], body: ChatRequest, params: SamplingParams
    ) -> AsyncIterator[str]:
        usage = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}
        for index in range(params.n):
            delta = {"role": "assistant", "content": ""}
            first = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield event({**head, "choices": [first], **usage})

        def choice(number: int, answer: CompletionOutput, start: int) -> dict[str, Any]:
            return {
                "index": answer.index,
                "delta": {"content": answer.new_text} if answer.new_text else {},
                "logprobs": _chat_logprobs(answer, start, body.top_logprobs or 0),
                "finish_reason": _REASONS.get(answer.finish_reason or ""),
            }

        async for text in self._events(head, streams, body, choice):
            yield text

    async def _events(
        self, head: dict[str, Any], streams: Sequence[Stream], body: GenerationRequest, choice: Any
    ) -> AsyncIterator[str]:
        """Events of all answers, then of the usage if it is asked for, then the end."""
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        is_continuous = with_usage and bool(body.stream_options and body.stream_options.continuous_usage_stats)
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        last: dict[int, RequestOutput] = {}
        seen: dict[tuple[int, int], int] = {}  # tokens of each answer that were sent
        ended: set[tuple[int, int]] = set()
        outputs = merged(streams)
        try:
            async for number, output in outputs:
                last[number] = output
                for answer in output.outputs:
                    key = number, answer.index
                    start = seen.get(key, 0)
                    seen[key] = len(answer.token_ids)
                    has_logprobs = answer.logprobs is not None and len(answer.token_ids) > start
                    ends = answer.finish_reason is not None and key not in ended
                    if ends:
                        ended.add(key)
                    if answer.new_text or has_logprobs or ends:
                        if is_continuous:
                            usage = {"usage": _usage([last[key] for key in sorted(last)])}
                        yield event({**head, "choices": [choice(number, answer, start)], **usage})
            if with_usage:
                yield event({**head, "choices": [], "usage": _usage([last[key] for key in sorted(last)])})
        except Exception as error:
            # The status is long sent: clients know an error by its key.
            yield event(as_api_error(error).body("/v1/")[1])
            return
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]
        yield "data: [DONE]\n\n"

    def _head(self, prefix: str, kind: str) -> dict[str, Any]:
        name = self._settings.model_name
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            raise ApiError(404, f"The model {name!r} does not exist", param="model", code="model_not_found")

    async def _encode_all(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        try:
            return [await self._engine.encode(text) if isinstance(text, str) else text for text in prompts]
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from None

    def _check_lengths(
        self, prompts: list[list[int]], params: SamplingParams, name: str, max_tokens: int | None
    ) -> None:
        context = self._engine.llm.engine.max_model_len
        limit = min(self._settings.max_prompt_tokens or context, context - 1)
        for prompt in prompts:
            if len(prompt) > limit or len(prompt) + (max_tokens or 1) > context:
                raise ApiError(
                    400,
                    f"This model's maximum context length is {context} tokens, of which a prompt may have {limit}; you "
                    f"requested {len(prompt)} in the {name} and {max_tokens or 'at least 1'} in the completion",
                    param=name,
                    code="context_length_exceeded",
                )


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs)},
    }


def _tokens_from(answer: CompletionOutput, start: int) -> list[tuple[Logprob, list[Logprob]]]:
    """Of each token from `start` on: its own log-probability, and the likeliest tokens'."""
    assert answer.logprobs is not None
    pairs = zip(answer.token_ids[start:], answer.logprobs[start:], strict=True)
    return [(entry[token], sorted(entry.values(), key=lambda other: other.rank)) for token, entry in pairs]


def _completion_logprobs(answer: CompletionOutput, start: int, offset: int) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    entries = _tokens_from(answer, start)
    offsets = []
    for own, _ in entries:
        offsets.append(offset)
        offset += len(own.decoded_token)
    return {
        "tokens": [own.decoded_token for own, _ in entries],
        "token_logprobs": [own.logprob for own, _ in entries],
        # Of tokens with one text the likeliest, which a dictionary keeps when it comes last.
        "top_logprobs": [{other.decoded_token: other.logprob for other in reversed(top)} for _, top in entries],
        "text_offset": offsets,
    }


def _chat_logprobs(answer: CompletionOutput, start: int, num_top: int) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    content = [
        {**_entry(own), "top_logprobs": [_entry(other) for other in top[:num_top]]}
        for own, top in _tokens_from(answer, start)
    ]
    return {"content": content, "refusal": None}


def _entry(token: Logprob) -> dict[str, Any]:
    text = token.decoded_token
    # A part of a character has no text of its own.
    return {"token": text, "logprob": token.logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
