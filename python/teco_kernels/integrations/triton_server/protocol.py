"""The tensors that a request comes as and its answers go as; names are those of vLLM's and TensorRT-LLM's models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from teco_kernels.decoder.sampling_params import CompletionOutput, RequestOutput, SamplingParams


class TensorSpec(NamedTuple):
    """Triton's type of a tensor, and its one dimension (-1: any)."""

    data_type: str
    size: int


_FLAG, _TEXT, _INT, _FLOAT = (TensorSpec(f"TYPE_{name}", 1) for name in ("BOOL", "STRING", "INT32", "FP32"))

# Those of `SamplingParams` that may also come as tensors, as TensorRT-LLM's clients send them.
_SAMPLING = {
    "max_tokens": _INT,
    "min_tokens": _INT,
    "temperature": _FLOAT,
    "top_k": _INT,
    "top_p": _FLOAT,
    "min_p": _FLOAT,
    "presence_penalty": _FLOAT,
    "frequency_penalty": _FLOAT,
    "repetition_penalty": _FLOAT,
    "seed": TensorSpec("TYPE_UINT64", 1),
    "stop": TensorSpec("TYPE_STRING", -1),
    "stop_words": TensorSpec("TYPE_STRING", -1),  # TensorRT-LLM's name of `stop`
}

OUTPUTS = {
    "text_output": TensorSpec("TYPE_STRING", -1),
    "finish_reason": TensorSpec("TYPE_STRING", -1),
    "cumulative_logprob": TensorSpec("TYPE_FP32", -1),
    "logprobs": TensorSpec("TYPE_STRING", -1),
    "num_input_tokens": TensorSpec("TYPE_UINT32", 1),
    "num_output_tokens": TensorSpec("TYPE_UINT32", -1),
    "output_ids": TensorSpec("TYPE_INT32", -1),
}
"""Of every response; all but the first when the request has the input ``return_<name>``."""

INPUTS = {
    "text_input": _TEXT,
    "input_ids": TensorSpec("TYPE_INT32", -1),
    "stream": _FLAG,
    "exclude_input_in_output": _FLAG,
    "sampling_parameters": _TEXT,
    **_SAMPLING,
    **{f"return_{name}": _FLAG for name in OUTPUTS if name != "text_output"},
}
"""Of a request, each optional, but for one of the first two."""

_KINDS = {field.name: str(field.type) for field in fields(SamplingParams)}
_BOOLS = {"true": True, "false": False}


@dataclass(frozen=True)
class Generation:
    """What a request asks for.

    Attributes
    ----------
    prompt : str or list of int
    params : SamplingParams
    stream : bool
        Send text as it comes, not all of it at the end.
    with_input : bool
        Put the prompt before the answer.
    returned : frozenset of str
        Outputs to send beside the text.
    """

    prompt: str | list[int]
    params: SamplingParams
    stream: bool
    with_input: bool
    returned: frozenset[str]


def read_request(tensors: Mapping[str, np.ndarray[Any, Any]], parameters: Mapping[str, Any]) -> Generation:
    """What a request asks for.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        Of `INPUTS`, those that came, in these types and shapes; texts are bytes.
    parameters : mapping of str to object
        The request's parameters: sampling parameters by vLLM's names.

    Raises
    ------
    ValueError
        Naming what is wrong.
    """
    if ("text_input" in tensors) == ("input_ids" in tensors):
        raise ValueError(
            f"text_input, input_ids: expected one of them, got {'both' if 'text_input' in tensors else 'none'}"
        )
    prompt = _text(tensors, "text_input") if "text_input" in tensors else tensors["input_ids"].tolist()
    stream = _flag(tensors, "stream", False)
    with_input = not _flag(tensors, "exclude_input_in_output", stream)
    if with_input and stream:
        raise ValueError("exclude_input_in_output: expected true, or nothing, when streaming; got false")
    returned = frozenset(name for name in OUTPUTS if _flag(tensors, f"return_{name}", False))
    params = _sampling_params(tensors, parameters, logprobs=bool(returned & {"logprobs", "cumulative_logprob"}))
    if "output_ids" in returned and params.n > 1:
        raise ValueError(f"return_output_ids: expected one answer (n), got {params.n}")
    return Generation(prompt, params, stream, with_input, returned)


class ResponseWriter:
    """Makes the tensors of a request's responses.

    Parameters
    ----------
    generation : Generation
    input_text : str
        The prompt as text.
    """

    def __init__(self, generation: Generation, input_text: str) -> None:
        self._generation = generation
        self._input_text = input_text if generation.with_input else ""
        self._num_sent = [0] * generation.params.n  # tokens of each answer

    def tensors(self, output: RequestOutput) -> dict[str, np.ndarray[Any, Any]]:
        """What came since the last call; when the request does not stream, all of it."""
        answers = output.outputs
        new = [answer.token_ids[sent:] for answer, sent in zip(answers, self._num_sent, strict=True)]
        texts = [answer.new_text if self._generation.stream else self._input_text + answer.text for answer in answers]
        made: dict[str, Any] = {
            "text_output": texts,
            "finish_reason": [answer.finish_reason or "" for answer in answers],
            "cumulative_logprob": [answer.cumulative_logprob or 0.0 for answer in answers],
            "logprobs": [_logprobs(answer, sent) for answer, sent in zip(answers, self._num_sent, strict=True)],
            "num_input_tokens": [len(output.prompt_token_ids)],
            "num_output_tokens": [len(token_ids) for token_ids in new],
            "output_ids": new[0],
        }
        self._num_sent = [len(answer.token_ids) for answer in answers]
        returned = self._generation.returned | {"text_output"}
        return {name: _array(values, OUTPUTS[name]) for name, values in made.items() if name in returned}

    def has_news(self, output: RequestOutput) -> bool:
        """Whether a response is due: tokens that are part of a character have no text yet."""
        return output.finished or (self._generation.stream and any(answer.new_text for answer in output.outputs))


def _sampling_params(
    tensors: Mapping[str, np.ndarray[Any, Any]], parameters: Mapping[str, Any], *, logprobs: bool
) -> SamplingParams:
    given = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
    sources: list[Mapping[str, Any]] = [given]
    if "sampling_parameters" in tensors:
        sources.append(_json_object(_text(tensors, "sampling_parameters")))
    sources += [{name: _plain(tensors, name)} for name in _SAMPLING if name in tensors]
    merged: dict[str, Any] = {}
    for source in sources:
        for key, value in source.items():
            name = "stop" if key == "stop_words" else key
            if name not in _KINDS:
                raise ValueError(f"{name}: no such sampling parameter; there are {', '.join(sorted(_KINDS))}")
            if name in merged:
                raise ValueError(f"{name}: expected once, came twice")
            merged[name] = _converted(name, value)
    if logprobs:
        merged.setdefault("logprobs", 0)
    return SamplingParams(**merged)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"sampling_parameters: expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"sampling_parameters: expected a JSON object, got {text:.100}")
    return value


def _converted(name: str, value: Any) -> Any:
    """As `SamplingParams` has it; clients send numbers as texts too, and keys of JSON are texts.

    What is of no use stays as it is, for `SamplingParams` to refuse.
    """
    kind = _KINDS[name]
    if kind == "bool":
        value = _BOOLS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false")
        return value
    try:
        if kind.startswith("dict") and isinstance(value, dict):
            return {int(key): number for key, number in value.items()}
        if isinstance(value, str) and "str" not in kind:
            return int(value) if kind.startswith("int") else float(value)
    except ValueError:
        pass
    return value


def _plain(tensors: Mapping[str, np.ndarray[Any, Any]], name: str) -> Any:
    if _SAMPLING[name].data_type != "TYPE_STRING":
        return tensors[name].item()
    return [_decoded(name, text) for text in tensors[name].tolist()]


def _text(tensors: Mapping[str, np.ndarray[Any, Any]], name: str) -> str:
    return _decoded(name, tensors[name].item())


def _decoded(name: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8: {error}") from None


def _flag(tensors: Mapping[str, np.ndarray[Any, Any]], name: str, default: bool) -> bool:
    return bool(tensors[name].item()) if name in tensors else default


def _logprobs(answer: CompletionOutput, start: int) -> str:
    """JSON as vLLM's model sends it: of each token a mapping of ids, the token's own first."""
    return json.dumps(
        [{token: entry._asdict() for token, entry in entries.items()} for entries in (answer.logprobs or [])[start:]]
    )


def _array(values: list[Any], spec: TensorSpec) -> np.ndarray[Any, Any]:
    if spec.data_type == "TYPE_STRING":
        return np.array([text.encode() for text in values], dtype=np.object_)
    kinds = {"TYPE_FP32": np.float32, "TYPE_UINT32": np.uint32, "TYPE_INT32": np.int32}
    return np.array(values, dtype=kinds[spec.data_type])
