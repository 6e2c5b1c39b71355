"""Bodies of OpenAI's requests: their parameters, and of vLLM's further ones those that the sampler has."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from teco_kernels.decoder.sampling_params import SamplingParams
from teco_kernels.integrations.http.errors import ApiError, as_api_error

_MAX_STOPS, _MAX_BIASES, _LARGEST_BIAS = 4, 300, 100  # OpenAI's
_ASKING_NOTHING: dict[str, tuple[Any, ...]] = {  # values of fields that are not supported
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Body):
    """What a stream has besides text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # of no use without it
    continuous_usage_stats: bool | None = False  # vLLM's: usage so far in every chunk


class GenerationRequest(_Body):
    """What completions and chat have in common."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=1, ge=1)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = 1.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = None
    # vLLM's
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """For the engine; ApiError naming what it does not take."""
        if isinstance(self.stop, list) and len(self.stop) > _MAX_STOPS:
            raise ApiError(400, f"stop: expected at most {_MAX_STOPS} texts, got {len(self.stop)}", param="stop")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only allowed when 'stream' is true", param="stream_options")
        if self.logit_bias is not None and len(self.logit_bias) > _MAX_BIASES:
            raise ApiError(400, f"logit_bias: expected at most {_MAX_BIASES} tokens", param="logit_bias")
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(400, "logit_bias: expected token ids as keys", param="logit_bias") from None
        if any(abs(value) > _LARGEST_BIAS for value in bias.values()):
            raise ApiError(
                400, f"logit_bias: expected values from -{_LARGEST_BIAS} to {_LARGEST_BIAS}", param="logit_bias"
            )
        try:
            return SamplingParams(
                n=self.n or 1,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                min_p=self.min_p or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                logit_bias=bias or None,
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                stop=self.stop,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=self.ignore_eos,
                include_stop_str_in_output=self.include_stop_str_in_output,
                skip_special_tokens=self.skip_special_tokens,
                seed=self.seed,
                logprobs=logprobs,
            )
        except ValueError as error:
            raise as_api_error(error) from None


class CompletionRequest(GenerationRequest):
    """Of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    def params(self) -> SamplingParams:
        """For the engine."""
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, "best_of: expected n, or nothing", param="best_of", code="unsupported_parameter")
        if self.suffix:
            raise ApiError(400, "suffix: not supported", param="suffix", code="unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo: not supported with logprobs", param="echo", code="unsupported_parameter")
        return self.sampling_params(max_tokens=self.max_tokens or 16, logprobs=self.logprobs)

    def prompts(self) -> list[str] | list[list[int]]:
        """One or many, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Body):
    """Part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Fields that the server does not know reach the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """With its parts joined: templates expect one text."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ResponseFormat(BaseModel):
    """Of an answer; text alone is supported."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: str


class ChatRequest(GenerationRequest):
    """Of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    # Of `_ASKING_NOTHING`
    audio: Any = None
    function_call: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    moderation: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    tool_choice: Any = None
    tools: list[Any] | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    # Of no effect
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    # vLLM's
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def params(self) -> SamplingParams:
        """For the engine."""
        unsupported = [name for name, values in _ASKING_NOTHING.items() if getattr(self, name) not in values]
        if self.response_format is not None and self.response_format.type != "text":
            unsupported.append("response_format")
        for name in unsupported:
            raise ApiError(400, f"{name}: not supported", param=name, code="unsupported_parameter")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: only allowed when 'logprobs' is true", param="top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling_params(max_tokens=wanted, logprobs=logprobs)
