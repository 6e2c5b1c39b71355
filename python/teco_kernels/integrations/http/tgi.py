"""TGI's protocol: ``/generate``, ``/generate_stream``, ``/info``, ``/health`` and ``/tokenize``."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from teco_kernels import __version__
from teco_kernels.decoder.async_engine import AsyncEngine, Stream
from teco_kernels.decoder.sampling_params import CompletionOutput, Logprob, SamplingParams
from teco_kernels.decoder.tokenizer import Detokenizer
from teco_kernels.integrations.http.errors import ApiError, as_api_error
from teco_kernels.integrations.http.settings import Settings
from teco_kernels.integrations.http.streaming import Events, event, finished, reserved, unless_disconnected

_MAX_STOPS, _MAX_TOP = 4, 5  # TGI's defaults
_UNSUPPORTED = "typical_p", "watermark", "grammar", "decoder_input_details", "adapter_id"


class Parameters(BaseModel):
    """Of a generation. As in TGI, fields that are not known are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")
    do_sample: bool = False
    max_new_tokens: int | None = Field(default=100, ge=1)
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, lt=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    return_full_text: bool | None = False
    stop: list[str] = Field(default_factory=list, max_length=_MAX_STOPS)
    seed: int | None = Field(default=None, ge=0)
    truncate: int | None = Field(default=None, gt=0)
    best_of: int | None = Field(default=None, ge=1)
    details: bool = False
    top_n_tokens: int | None = Field(default=None, ge=0, le=_MAX_TOP)
    typical_p: float | None = None
    watermark: bool = False
    grammar: Any = None
    decoder_input_details: bool = False
    adapter_id: str | None = None

    def sampling_params(self, *, logprobs: bool) -> SamplingParams:
        """For the engine; ApiError naming what it does not take."""
        for name in _UNSUPPORTED:
            if getattr(self, name):
                raise ApiError(400, f"`{name}` is not supported", param=name)
        if self.best_of not in (None, 1):
            raise ApiError(400, "`best_of` is not supported above 1", param="best_of")
        temperature = 1.0 if self.temperature is None else self.temperature
        samples = self.do_sample or temperature != 1.0 or self.top_k is not None or self.top_p is not None
        seed = secrets.randbits(63) if self.seed is None else self.seed
        try:
            return SamplingParams(
                temperature=temperature if samples else 0.0,
                top_k=self.top_k or 0,
                top_p=1.0 if self.top_p is None else self.top_p,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                frequency_penalty=self.frequency_penalty or 0.0,
                max_tokens=self.max_new_tokens,
                stop=self.stop or None,
                include_stop_str_in_output=True,  # as TGI does
                seed=seed if samples else None,  # drawn here, as the answer's details tell it
                logprobs=(self.top_n_tokens or 0) if logprobs else None,
            )
        except ValueError as error:
            raise as_api_error(error) from None


class GenerateRequest(BaseModel):
    """Of ``/generate``, ``/generate_stream`` and ``/``."""

    model_config = ConfigDict(strict=True, extra="ignore")
    inputs: str
    parameters: Parameters | None = None
    stream: bool = False


class TokenizeRequest(BaseModel):
    """Of ``/tokenize``."""

    model_config = ConfigDict(strict=True, extra="ignore")
    inputs: str


class TGIRoutes:
    """The endpoints.

    Parameters
    ----------
    engine : AsyncEngine
    settings : Settings
    """

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self.router = APIRouter()
        for path, method, function in (
            ("/health", "GET", self.health),
            ("/info", "GET", self.info),
            ("/tokenize", "POST", self.tokenize),
            ("/generate", "POST", self.generate),
            ("/generate_stream", "POST", self.generate_stream),
            ("/", "POST", self.compatible),
        ):
            self.router.add_api_route(path, function, methods=[method], response_model=None)

    async def health(self) -> Response:
        """Whether requests can be answered."""
        if (failure := self._engine.failure) is not None:
            raise ApiError(503, f"unhealthy: {failure}")
        return Response(status_code=200)

    async def info(self) -> dict[str, Any]:
        """The model and the limits."""
        engine = self._engine.llm.engine
        limit = min(self._settings.max_prompt_tokens or engine.max_model_len, engine.max_model_len - 1)
        return {
            "model_id": self._settings.model_name,
            "model_sha": None,
            "model_dtype": str(engine.model.dtype),
            "model_device_type": "cpu",
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": self._engine.max_concurrent_requests,
            "max_best_of": 1,
            "max_stop_sequences": _MAX_STOPS,
            "max_input_tokens": limit,
            "max_total_tokens": engine.max_model_len,
            "router": "teco_kernels",
            "version": __version__,
        }

    async def tokenize(self, body: TokenizeRequest) -> list[dict[str, Any]]:
        """Tokens of a text."""
        token_ids = await self._encode(body.inputs)
        self._check_length(token_ids)
        decode = self._engine.tokenizer.decode

        def tokens() -> list[dict[str, Any]]:
            return [{"id": token, "text": decode([token], skip_special_tokens=False)} for token in token_ids]

        return await asyncio.to_thread(tokens)

    async def generate(self, body: GenerateRequest, request: Request) -> Response:
        """Go on from a text."""
        answer = await self._answer(body, request)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    async def compatible(self, body: GenerateRequest, request: Request) -> Response:
        """What TGI answers at its root: one of the other two."""
        if body.stream:
            return await self.generate_stream(body)
        answer = await self._answer(body, request)
        return answer if isinstance(answer, Response) else JSONResponse([answer])

    async def _answer(self, body: GenerateRequest, request: Request) -> dict[str, Any] | Response:
        parameters = body.parameters or Parameters()
        params = parameters.sampling_params(logprobs=parameters.details)
        stream = await self._add(body, parameters, params)
        outputs = await unless_disconnected(request, finished([stream]))
        if isinstance(outputs, Response):
            return outputs
        answer = outputs[0].outputs[0]
        text = (body.inputs if parameters.return_full_text else "") + answer.text
        if not parameters.details:
            return {"generated_text": text}
        pieces = _Pieces(self._engine, outputs[0].prompt_token_ids)
        details = {"prefill": [], **_details(answer, params), "tokens": pieces.tokens(answer)}
        if parameters.top_n_tokens:
            assert answer.logprobs is not None
            details["top_tokens"] = [pieces.top(entry, parameters.top_n_tokens) for entry in answer.logprobs]
        return {"generated_text": text, "details": details}

    async def generate_stream(self, body: GenerateRequest) -> Response:
        """Go on from a text, token by token."""
        parameters = body.parameters or Parameters()
        params = parameters.sampling_params(logprobs=True)
        stream = await self._add(body, parameters, params)
        return Events(self._events(stream, body.inputs, parameters, params), [stream])

    async def _events(
        self, stream: Stream, inputs: str, parameters: Parameters, params: SamplingParams
    ) -> AsyncIterator[str]:
        pieces: _Pieces | None = None
        count = 0
        try:
            async for output in stream:
                if pieces is None:
                    pieces = _Pieces(self._engine, output.prompt_token_ids)
                answer = output.outputs[0]
                for token in pieces.tokens(answer):
                    count += 1
                    is_last = output.finished and count == len(answer.token_ids)
                    text = (inputs if parameters.return_full_text else "") + answer.text
                    message = {
                        "index": count,
                        "token": token,
                        "generated_text": text if is_last else None,
                        "details": _details(answer, params) if is_last else None,
                    }
                    if parameters.top_n_tokens:
                        assert answer.logprobs is not None
                        message["top_tokens"] = pieces.top(answer.logprobs[count - 1], parameters.top_n_tokens)
                    yield event(message)
        except Exception as error:
            yield event(as_api_error(error).body("/generate_stream")[1])
        finally:
            stream.abort()

    async def _add(self, body: GenerateRequest, parameters: Parameters, params: SamplingParams) -> Stream:
        with reserved(self._engine, 1) as streams:
            token_ids = await self._encode(body.inputs)
            if parameters.truncate is not None:
                token_ids = token_ids[-parameters.truncate :]
            self._check_length(token_ids)
            context, wanted = self._engine.llm.engine.max_model_len, params.max_tokens or 1
            if len(token_ids) + wanted > context:
                raise ApiError(
                    400,
                    f"`inputs` tokens + `max_new_tokens` must be <= {context}. Given: {len(token_ids)} `inputs` tokens "
                    f"and {wanted} `max_new_tokens`",
                )
            await self._engine.start(streams, [token_ids], params)
        return streams[0]

    def _check_length(self, token_ids: list[int]) -> None:
        context = self._engine.llm.engine.max_model_len
        limit = min(self._settings.max_prompt_tokens or context, context - 1)
        if len(token_ids) > limit:
            raise ApiError(400, f"`inputs` must have less than {limit + 1} tokens. Given: {len(token_ids)}")

    async def _encode(self, text: str) -> list[int]:
        if not text:
            raise ApiError(400, "`inputs` cannot be empty")
        try:
            return await self._engine.encode(text)
        except ValueError as error:
            raise ApiError(400, f"`inputs`: {error}") from None


class _Pieces:
    """Tokens of an answer with their texts, which together are that of the answer."""

    def __init__(self, engine: AsyncEngine, prompt: list[int]) -> None:
        self._tokenizer = engine.tokenizer
        self._detokenizer = Detokenizer(engine.tokenizer, context=prompt[-5:])
        self._count = 0

    def tokens(self, answer: CompletionOutput) -> list[dict[str, Any]]:
        """Those that are new; an answer's last token has what was held back."""
        start, self._count = self._count, len(answer.token_ids)
        tokens = []
        for number in range(start, self._count):
            token_id = answer.token_ids[number]
            text = self._detokenizer.push([token_id])
            if answer.finish_reason is not None and number == self._count - 1:
                text += self._detokenizer.pending() if not text else ""
            special = not self._tokenizer.decode([token_id])
            if special:
                text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            logprob = answer.logprobs[number][token_id].logprob if answer.logprobs is not None else None
            tokens.append({"id": token_id, "text": text, "logprob": logprob, "special": special})
        return tokens

    def top(self, entry: dict[int, Logprob], count: int) -> list[dict[str, Any]]:
        """The likeliest tokens at one place."""
        likeliest = sorted(entry.items(), key=lambda item: item[1].rank)[:count]
        return [
            {
                "id": token,
                "text": value.decoded_token,
                "logprob": value.logprob,
                "special": not self._tokenizer.decode([token]),
            }
            for token, value in likeliest
        ]


def _details(answer: CompletionOutput, params: SamplingParams) -> dict[str, Any]:
    reason = "length"
    if answer.finish_reason == "stop":
        reason = "eos_token" if answer.stop_reason is None else "stop_sequence"
    return {"finish_reason": reason, "generated_tokens": len(answer.token_ids), "seed": params.seed}
