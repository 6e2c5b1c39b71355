"""What the base model is asked to go on from: articles, instructions and functions, in parts that share no source."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any, Literal

from teco_kernels.assets import calibration_articles
from teco_kernels.decoder.tokenizer import Tokenizer

#: Training, and what a recipe is chosen by. Neither has any of the held-out articles, nor a question of a benchmark.
Part = Literal["training", "validation"]

#: Every so many-th article, template and function is for validation.
_VALIDATION_STRIDE = 8
_SHORTEST_PARAGRAPH, _LONGEST_PASSAGE = 300, 900  # characters
_ARTICLE_TOKENS = (16, 64)
_COMMENTS = ("A function that", "Write a function that", "This function")


def prompts(tokenizer: Tokenizer, count: int, part: Part = "training", *, seed: int = 0) -> list[list[int]]:
    """`count` prompts as token ids, reproducibly drawn; those of a smaller count are the beginning of a larger one's.

    A half are instructions in the model's chat template (paragraphs of articles to work on among them), a third are
    beginnings of paragraphs, the rest Python functions to be completed. A model without a template gets the
    instructions as they are.
    """
    kinds = {"instructions": 3, "articles": 2, "functions": 1}
    order = [kind for kind, weight in kinds.items() for _ in range(weight)]
    texts = _Texts(part, random.Random(f"{part} {seed}"))
    drawn: list[list[int]] = []
    while len(drawn) < count:
        kind = order[len(drawn) % len(order)]
        if kind == "articles":
            drawn.append(tokenizer.encode(texts.paragraph())[: texts.random.randint(*_ARTICLE_TOKENS)])
        elif kind == "functions":
            drawn.append(tokenizer.encode(texts.function()))
        else:
            drawn.append(_chat(tokenizer, texts.instruction()))
    return drawn


def _chat(tokenizer: Tokenizer, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode(text)
    conversation = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return tokenizer.encode(conversation, add_special_tokens=False)


class _Texts:
    """Draws texts from one part of the material."""

    def __init__(self, part: Part, generator: random.Random) -> None:
        self.random = generator
        material = json.loads(resources.files(__package__).joinpath("prompts.json").read_text(encoding="utf-8"))
        self._slots: dict[str, list[str]] = material["slots"]
        # Templates of both parts are filled from the same slots, but for what would make two prompts equal.
        self._instructions = list(_of_part(material["instructions"], part))
        self._passage_instructions: list[str] = material["passage_instructions"]
        self._functions = list(_of_part(material["functions"], part))
        articles = _of_part(calibration_articles(), part)
        paragraphs = (text for article in articles for text in article.split("\n\n"))
        self._paragraphs = [text for text in paragraphs if len(text) >= _SHORTEST_PARAGRAPH]

    def paragraph(self) -> str:
        return self.random.choice(self._paragraphs)

    def instruction(self) -> str:
        if self.random.random() < 1 / 6:
            passage = self.paragraph()[:_LONGEST_PASSAGE].rpartition(". ")[0] + "."
            return self._filled(self.random.choice(self._passage_instructions)).replace("{passage}", passage)
        return self._filled(self.random.choice(self._instructions))

    def function(self) -> str:
        """A signature and a docstring, in one of three styles."""
        if self.random.random() < 1 / 3:
            task = self.random.choice(self._slots["task"])
            return f"# {self.random.choice(_COMMENTS)} {task}.\ndef "
        name, arguments, result, text, call, value = self.random.choice(self._functions)
        head = f"def {name}({arguments}) -> {result}:\n"
        if self.random.random() < 0.5:
            return f'{head}    """{text}\n\n    >>> {call}\n    {value}\n    """\n'
        return f'from typing import *\n\n\n{head}    """ {text}\n    Example: {call} == {value}\n    """\n'

    def _filled(self, template: str) -> str:
        return re.sub(
            r"\{(\w+)\}",
            lambda slot: self.random.choice(self._slots[slot[1]]) if slot[1] in self._slots else slot[0],
            template,
        )


def _of_part(items: list[Any], part: Part) -> Iterator[Any]:
    for index, item in enumerate(items):
        if (index % _VALIDATION_STRIDE == _VALIDATION_STRIDE - 1) == (part == "validation"):
            yield item
