"""Tokenizers from directories, chat templates, and text as tokens arrive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, END, USER, save_tokenizer, tiny_tokenizer
from tokenizers import decoders, models, normalizers

from teco_kernels.decoder.tokenizer import Detokenizer, Tokenizer

END_ID = tiny_tokenizer().token_to_id(END)


def test_round_trip_through_a_directory(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    text = f"naïve 東京 🙂{END} 12.5"
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(END, "")
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_end_of_sequence_tokens_come_from_the_model_or_else_the_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == (END_ID,)
    assert Tokenizer.from_directory(tmp_path, [7, 8]).eos_token_ids == (7, 8)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == ()


def test_truncation_and_padding_of_the_training_run_are_ignored(tmp_path: Path) -> None:
    trained = tokenizers.Tokenizer.from_str(tiny_tokenizer().to_str())
    trained.enable_truncation(4)
    trained.enable_padding(length=8)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    for text in ("a", "The capital of France is Paris" * 5):
        assert tokenizer.encode(text) == tiny_tokenizer().encode(text).ids


def test_special_tokens_and_templates_in_every_notation(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}"}]
    config = {"eos_token": {"content": USER, "lstrip": False}, "bos_token": None, "chat_template": templates}
    file.write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.special_tokens == {"eos_token": USER}
    assert tokenizer.apply_chat_template([]) == USER
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template([]) == "from the file"


def render(template: str, **variables: object) -> str:
    messages = [{"role": "user", "content": "a <b> é"}]
    return Tokenizer(tiny_tokenizer(), chat_template=template).apply_chat_template(messages, **variables)


def test_what_templates_use() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "a <b> é"}]'
    assert render("{{ tools[0] }}|{{ enable_thinking }}", tools=["t"], enable_thinking=False) == "t|False"
    assert render("{% for m in messages %}\n{%- if true %}{% break %}{% endif %}{% endfor %}done") == "done"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% if add_generation_prompt %}yes{% endif %}") == "yes"
    assert (
        render("{{ messages[0] | tojson(sort_keys=true, indent=1) }}")
        == '{\n "content": "a <b> é",\n "role": "user"\n}'
    )


def test_templates_see_what_transformers_shows_them() -> None:
    """Tools and documents are None where none are given, and the marks of trained text are only marks."""
    assert render("{{ tools is none }} {{ documents is none }} {{ nothing is none }}") == "True True False"
    assert render("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}") == "user"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "refused by the chat template"),
        ("{{ messages.pop() }}", "refused by the chat template"),
        ("{{ ''.__class__.__mro__ }}", "refused by the chat template"),
        ("{{ messages[0]['content'] + 1 }}", "refused by the chat template"),
    ],
)
def test_refusals_of_a_template_are_one_error(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^messages: refused by the chat template: .*{message}|^messages: {message}"):
        render(template)


def test_no_template_is_said() -> None:
    with pytest.raises(ValueError, match="messages: expected a model with a chat template, this one has none"):
        Tokenizer(tiny_tokenizer()).apply_chat_template([])


@given(st.text(max_size=40), st.integers(0, 20))
def test_detokenised_pieces_are_the_text(text: str, context: int) -> None:
    """Cut anywhere: what came before the cut is only context, and no piece ends within a character."""
    tokenizer = Tokenizer(tiny_tokenizer())
    token_ids = tokenizer.encode("Some context. " + text)
    start = len(tokenizer.encode("Some context. "))
    if tokenizer.decode(token_ids[:start]) != "Some context. ":
        start = 0  # the first characters were merged with the context's last
    detokenizer = Detokenizer(tokenizer, context=token_ids[max(start - context, 0) : start])
    pieces = [detokenizer.push([token]) for token in token_ids[start:]]
    expected = tokenizer.decode(token_ids[start:])
    assert "".join(pieces) + detokenizer.pending() == expected
    if "\ufffd" not in text:
        assert "".join(pieces) == expected


@given(st.lists(st.integers(0, END_ID), max_size=60))
def test_detokenised_pieces_of_any_tokens_are_their_text(token_ids: list[int]) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token]) for token in token_ids]
    assert "".join(pieces) + detokenizer.pending() == tokenizer.decode(token_ids)


def test_spaces_that_a_decoder_strips_at_the_beginning() -> None:
    """Llama 2's kind: "▁" is a space, but not the first one of a text, so words need the context before them."""
    vocabulary = {"▁Hello": 0, "▁world": 1, "s": 2, "<unk>": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Prepend("▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    assert [Detokenizer(tokenizer, context=[0]).push([token]) for token in (1, 2)] == [" world", "s"]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in (0, 1, 4, 5, 6, 1)] == ["Hello", " world", "", "", "€", " world"]
