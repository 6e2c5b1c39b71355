"""How often a recycle head says what the model says next, on prompts that it was not trained on.

The model continues the prompts of `bench/recycle.py` greedily; at each place of its answers the head, context lookup,
and lookup else the head are asked for the token after the next one.

    python bench/acceptance.py head/ --prompts 40 --tokens 256
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from prompts import prompt_sets
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder.loader import load_source
from teco_kernels.quantization import default_quantized_model
from teco_kernels.training import Acceptance, acceptance, load_head
from teco_kernels.training.head import Base
from teco_kernels.training.recording import Recording, record

_COLUMNS = ("head", "lookup", "either", "matches", "head_elsewhere", "known")


def recordings(model: Path, count: int, num_tokens: int, folder: Path | None) -> dict[str, Recording]:
    """The answers to each set of prompts, from `folder` where they are there."""
    llm = LLM(model, max_num_seqs=64, max_model_len=2048, kv_cache_memory=4 << 30)
    params = SamplingParams(temperature=0, max_tokens=num_tokens)
    answers = {}
    for name, prompts in prompt_sets(llm.tokenizer, count).items():
        path = folder / f"{name}-{count}-{num_tokens}.safetensors" if folder else None
        if path and path.exists():
            answers[name] = Recording.load(path)
            continue
        with tqdm(total=sum(map(len, prompts)) + len(prompts) * num_tokens, desc=name, unit="token") as bar:
            answers[name] = record(llm, prompts, [params] * len(prompts), progress=bar.update)
        if path:
            answers[name].save(path)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, help="the 4-bit SmolLM2-135M when not given")
    parser.add_argument("--prompts", type=int, default=40, help="of each set")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recordings", type=Path, help="a folder to keep the answers in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = options.model or default_quantized_model()
    answers = recordings(model, options.prompts, options.tokens, options.recordings)
    base = Base(load_source(model))
    rows = []
    for path in options.head:
        head, vocabulary = load_head(path, base.config)
        counts = {name: acceptance(head, vocabulary, base, [answer]) for name, answer in answers.items()}
        counts["all"] = sum(counts.values(), Acceptance())
        table = Table("prompts", "places", title=f"acceptance, {path.name}, greedy, up to {options.tokens} tokens")
        for column in ("head", "lookup", "lookup, else head", "lookup matches", "head elsewhere", "in vocabulary"):
            table.add_column(column, justify="right")
        for name, count in counts.items():
            shares = count.shares()
            table.add_row(name, str(count.places), *(f"{shares[column]:.3f}" for column in _COLUMNS))
            rows.append({"head": path.name, "prompts": name, "places": count.places, **shares})
        Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
