"""Step times of a model shared by ranks, in turns with those of one process, beside what a model of cost predicts.

    python bench/tensor_parallel.py MODEL
    python bench/tensor_parallel.py MODEL --ranks 1 2 3 --rounds 20 --json tensor-parallel.json
    python bench/tensor_parallel.py MODEL --ranks 1 2 4 --heads 8 4

A decode step of one request. The prediction: what one rank takes with one thread, times the share of the bytes that the
slowest rank reads in each phase between two collectives, as many times as ranks take turns on a core, but not less than
what one process takes with a thread on every core, as the memory is one for all; a collective per phase, which is timed
by itself on as many ranks; and what is spent outside of a step's plan.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from collectives import python_ranks
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder import runner
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.model import Transformer
from teco_kernels.decoder.shard import Shard
from teco_kernels.ops import Plan

PROMPT = list(range(5, 25))


def phases(path: Path, world_size: int, activation: Any) -> list[list[int]]:
    """Bytes of weights that each rank reads, per phase of a step: between two collectives nobody waits."""
    source = load_source(path)
    ranks = []
    for rank in range(world_size):
        shard = Shard.of(source.config, rank, world_size)
        model = Transformer(source, dtype=torch.float32, max_model_len=64, activation=activation, shard=shard)
        parts = []
        for layer in model.stack.layers:
            parts += [layer.qkv.nbytes + layer.output.nbytes, layer.gate_up.nbytes + layer.down.nbytes]
        ranks.append([*parts, model.lm_head.nbytes])
    return [list(phase) for phase in zip(*ranks, strict=True)]


def random_model(like: Path, folder: Path, heads: tuple[int, int]) -> Path:
    """A dense bf16 model of the same sizes, but for so many query and KV heads: more ranks than KV heads cannot be."""
    raw = json.loads((like / "config.json").read_text())
    raw.pop("quantization_config", None)
    raw |= {"head_dim": raw["hidden_size"] // raw["num_attention_heads"], "torch_dtype": "bfloat16"}
    raw |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    hidden, channels, head_dim = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads[0] * head_dim, hidden),
        "self_attn.k_proj": (heads[1] * head_dim, hidden),
        "self_attn.v_proj": (heads[1] * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads[0] * head_dim),
        "mlp.gate_proj": (channels, hidden),
        "mlp.up_proj": (channels, hidden),
        "mlp.down_proj": (hidden, channels),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = range(raw["num_hidden_layers"])
    named = {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (raw["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    tensors = {name: (torch.randn(shape) / shape[-1] ** 0.5).bfloat16() for name, shape in named.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    (folder / "tokenizer.json").write_bytes((like / "tokenizer.json").read_bytes())
    return folder


def collective_milliseconds(world_size: int, hidden_size: int, rounds: int) -> float:
    """Of an all_reduce_rms_norm of a token's exact sums, in a plan."""
    if world_size == 1:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        ranks = python_ranks("teco", Path(folder), world_size)
        try:
            times = [ranks.time("all_reduce_rms_norm, native", 8 * hidden_size) for _ in range(rounds)]
        finally:
            ranks.close()
    return statistics.median(times) * 1e3


def milliseconds(llm: LLM, num_tokens: int) -> float:
    """Of a step, that of a decode stream of so many tokens."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    llm.generate([PROMPT], replace(params, max_tokens=4), use_tqdm=False)  # awake, with warm caches
    started = time.perf_counter()
    llm.generate([PROMPT], params, use_tqdm=False)
    return (time.perf_counter() - started) / num_tokens * 1e3


class TimedPlan(Plan):
    """Adds up the time of all replays."""

    seconds = 0.0

    def replay(self) -> None:
        started = time.perf_counter()
        super().replay()
        TimedPlan.seconds += time.perf_counter() - started


def outside_plan(llm: LLM, num_tokens: int) -> float:
    """Milliseconds of a step in which no kernels run."""
    before = TimedPlan.seconds
    whole = milliseconds(llm, num_tokens) * num_tokens
    return (whole - (TimedPlan.seconds - before) * 1e3) / num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--heads", type=int, nargs=2, help="query and KV heads of a random model of the same sizes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        heads = options.heads
        compare(options, random_model(options.model, Path(folder), heads) if heads else options.model)


def compare(options: argparse.Namespace, model: Path) -> None:
    """Measure, predict, and print both."""
    runner.Plan = TimedPlan  # type: ignore[misc]
    cores = len(os.sched_getaffinity(0))

    contestants = {f"{n} ranks, 1 thread each": (n, 1) for n in options.ranks}
    contestants[f"1 process, {cores} threads"] = (1, cores)
    llms = {
        name: LLM(model, tensor_parallel_size=n, num_threads=threads, max_model_len=512)
        for name, (n, threads) in contestants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in llms}
    torch.set_num_threads(1)
    together = next(name for name, of in contestants.items() if of == (1, cores))
    one = next(name for name, of in contestants.items() if of == (1, 1))
    outside: list[float] = []
    for _ in range(options.rounds):
        for name, llm in llms.items():
            torch.set_num_threads(contestants[name][1])
            times[name].append(milliseconds(llm, options.tokens))
        torch.set_num_threads(1)
        outside.append(outside_plan(llms[one], options.tokens))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fixed = statistics.median(outside)
    for name in [name for name in llms if name != together]:
        llms.pop(name).close()
    hidden_size = llms[together].config.hidden_size

    table = Table("", "measured, ms", "predicted, ms", "share of the slowest rank", "collectives", "us each")
    results: dict[str, Any] = {}
    for name, (n, _) in contestants.items():
        parts = phases(model, n, "int8")
        share = sum(map(max, parts)) / sum(map(sum, parts))
        # Of two phases per layer the ends, and the embedding; the two of the head's result.
        collectives = len(parts) + 2 if n > 1 else 0
        predicted, each = medians[name], collective_milliseconds(n, hidden_size, options.rounds)
        if n > 1:
            turns = -(-n // cores)  # ranks without a core wait until another one waits
            alone = (medians[one] - fixed) * share * turns
            predicted = fixed + max(alone, medians[together] - fixed) + collectives * each
        results[name] = {"measured": medians[name], "predicted": predicted, "share": share, "collective": each}
        cells = f"{medians[name]:.2f}", f"{predicted:.2f}", f"{share:.3f}", str(collectives), f"{each * 1e3:.1f}"
        table.add_row(name, *cells)
    Console().print(table)
    llms[together].close()
    if options.json:
        options.json.write_text(json.dumps({"milliseconds": times, "fixed": fixed, "results": results}, indent=1))


if __name__ == "__main__":
    main()
