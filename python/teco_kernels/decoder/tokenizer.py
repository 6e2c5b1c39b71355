"""Text to token ids and back, chat templates, and detokenisation as tokens arrive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from teco_kernels.decoder.json_file import read_json

# How GGUF's `tokenizer.ggml.pre` splits text before byte-pair encoding, as (digits one by one, regular expression);
# no expression: GPT-2's own.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GGUF_SPLITS: dict[str, tuple[bool, str | None]] = {
    "default": (False, None),
    "gpt-2": (False, None),
    "smollm": (True, None),
    "qwen2": (False, _QWEN2_SPLIT),
    "llama-bpe": (False, _LLAMA3_SPLIT),
}
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


class Tokenizer:
    """A `tokenizers.Tokenizer` with what serving needs around it.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
    eos_token_ids : tuple of int
        Tokens that end an answer.
    chat_template : str, optional
        A Jinja template, run in a sandbox.
    special_tokens : mapping
        Names to tokens, e.g. ``{"bos_token": "<s>"}``; the template sees them.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def from_directory(cls, path: Path, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
        """Read ``tokenizer.json`` and, where present, ``tokenizer_config.json`` and ``chat_template.jinja``.

        `eos_token_ids` are the model configuration's; without them the tokenizer's own end-of-sequence token counts.
        """
        file = path / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file}: file is missing")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the `tokenizers` package raises plain Exception
            raise ValueError(f"{file}: truncated or damaged: {error}") from None
        # Some files carry the settings of the training run, which would cut prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = read_json(path / "tokenizer_config.json", optional=True)
        contents = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token")
        }
        special = {key: content for key, content in contents.items() if isinstance(content, str)}
        if not eos_token_ids and "eos_token" in special:
            own = tokenizer.token_to_id(special["eos_token"])
            eos_token_ids = () if own is None else (own,)
        template = _chat_template(path, config)
        return cls(tokenizer, eos_token_ids=tuple(eos_token_ids), chat_template=template, special_tokens=special)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
        """Build a byte-level BPE tokenizer from GGUF metadata; `path` is named in errors."""
        kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or not isinstance(split, str) or split not in _GGUF_SPLITS:
            raise ValueError(
                f"{path}: expected a gpt2 tokenizer with pre-tokenizer {', '.join(_GGUF_SPLITS)}, got {kind!r} with "
                f"{split!r}; use the model's Hugging Face directory instead"
            )
        tokens, merges, types = (
            metadata.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "merges", "token_type")
        )
        if not (isinstance(tokens, list) and isinstance(types, list)):
            raise ValueError(f"{path}: damaged tokenizer: expected lists of tokens and of their types")
        try:
            pairs = [tuple(merge.split(" ", 1)) for merge in merges]
            vocabulary = {token: index for index, token in enumerate(tokens)}
            tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
        except Exception as error:  # the `tokenizers` package raises plain Exception
            raise ValueError(f"{path}: damaged tokenizer: {error}") from None
        digits, expression = _GGUF_SPLITS[split]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            ([pre_tokenizers.Digits(individual_digits=True)] if digits else [])
            + ([pre_tokenizers.Split(Regex(expression), "isolated")] if expression else [])
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)]
        )
        if split == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, types, strict=False):
            if kind in (_CONTROL, _USER_DEFINED):
                tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
        found = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
        ids = {name: index for name, index in found.items() if index is not None}
        for name, index in ids.items():
            if not (isinstance(index, int) and 0 <= index < len(tokens)):
                raise ValueError(f"{path}: damaged tokenizer: {name} token {index!r} of {len(tokens)}")
        special = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids}
        # Llama 3's files leave the key out; llama.cpp knows them by their pre-tokenizer.
        if metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe") and "bos_token" in special:
            bos = special["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
            )
        eos = tuple(ids[name] for name in ("eos", "eot") if name in ids)
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise ValueError(f"{path}: expected a text 'tokenizer.chat_template', got {template!r:.100}")
        return cls(tokenizer, eos_token_ids=eos, chat_template=template, special_tokens=special)

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a directory."""
        self._tokenizer.save(str(Path(path) / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (Path(path) / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError(f"text: expected valid Unicode, got {text!r:.100}") from None
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no valid UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text for a conversation, ``[{"role": ..., "content": ...}, ...]``."""
        if self.chat_template is None:
            raise ValueError("messages: expected a model with a chat template, this one has none")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        # As in transformers, `tools` and `documents` are always defined: templates ask whether they are None.
        context = {"tools": None, "documents": None, **self.special_tokens, **variables}
        context |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return environment.from_string(self.chat_template).render(context)
        except (TemplateError, TypeError, ValueError) as error:  # the latter two from operations on the messages
            raise ValueError(f"messages: refused by the chat template: {error}") from None


class Detokenizer:
    """Text of one answer as its tokens arrive; holds back what may still become a different character.

    Decoding a token alone would lose the space before it or cut a character in two, so each addition is the difference
    between two decodings of a short window.

    Parameters
    ----------
    tokenizer : Tokenizer
    context : sequence of int
        The tokens just before the answer.
    skip_special_tokens : bool
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._token_ids = list(context)
        self._window_start = 0  # tokens before it no longer matter
        self._emitted_end = len(context)  # tokens before it are in the text already

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens and return the text that is certain now; it never ends within a character."""
        self._token_ids += token_ids
        text = self.pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window_start, self._emitted_end = self._emitted_end, len(self._token_ids)
        return text

    def pending(self) -> str:
        """The text that is held back; when no more tokens come, it is the rest."""
        before = self._decode(self._window_start, self._emitted_end)
        return self._decode(self._window_start, len(self._token_ids))[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=self._skip)


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what a model was trained to say: its content as it is."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    """The filter `tojson` as transformers has it: jinja2's own escapes for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The template of a Hugging Face directory: a file of its own, or an entry of ``tokenizer_config.json``."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{path / 'tokenizer_config.json'}: expected a text 'chat_template', got {template!r:.100}")
    return template
