"""Measures what quantisation costs a real model, and writes the table of docs/quality.md.

Each row is made in a process of its own, with one thread unless told otherwise, and remembered in a JSON file of the
cache folder: whatever interrupts the run, the next one goes on with the rows that are missing.

    python bench/quality.py                                 # SmolLM2-135M-Instruct
    python bench/quality.py --model qwen.gguf --out qwen.md # any other that the package loads
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from teco_kernels.assets import cache_folder, default_model, held_out_text
from teco_kernels.decoder.loader import Source, load_source
from teco_kernels.quantization import QuantizationSettings, quantize_model, round_to_nearest
from teco_kernels.quantization.default import DEFAULT_SETTINGS, QUANTIZER_VERSION
from teco_kernels.quantization.perplexity import perplexity
from teco_kernels.quantization.save import save_model
from teco_kernels.quantization.torch_layer import STAGES

WINDOW, TOKENS = 1024, 8192
ORDERS = {False: "", True: "act-order", "static_groups": "static groups", "group_aware": "group-aware order"}


@dataclass(frozen=True, eq=False)
class Row:
    """One way of quantising. `settings` None: not at all."""

    method: str
    settings: QuantizationSettings | None = None
    remark: str = ""

    def key(self, model: Path) -> str:
        """Of what decides the result; settings that have their default value do not count."""
        given = asdict(self.settings) if self.settings else {}
        changed = {name: value for name, value in given.items() if value != getattr(QuantizationSettings(), name)}
        fields = [model.name, file_bytes(model), QUANTIZER_VERSION, WINDOW, TOKENS, self.method, changed]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def rows(source: Source, windows: int) -> list[Row]:
    """The rows of the table, with the largest group size of 128 and 64 that divides all inputs, and with 32."""
    config = source.config
    inputs = (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    group = next((size for size in (128, 64) if not any(n % size for n in inputs)), 32)
    rtn = QuantizationSettings(group_size=group, symmetric=False, head_bits=None)
    plain = replace(rtn, clip_search=True, dampening=0.05, num_sequences=windows)
    best = replace(plain, act_order="group_aware", asymmetric=1.0)
    small = {"group_size": 32}
    return [
        Row("source"),
        Row("RTN", replace(rtn, bits=8)),
        Row("GPTQ", replace(plain, bits=8)),
        Row("RTN", rtn),
        Row("RTN", replace(rtn, clip_search=True)),
        Row("GPTQ", plain),
        Row("GPTQ", replace(plain, act_order="static_groups")),
        Row("GPTQ", replace(plain, act_order=True)),
        Row("GPTQ", replace(plain, act_order="group_aware")),
        Row("GPTQ", replace(best, asymmetric=0.5)),
        Row("GPTQ", best),
        Row("GPTQ", replace(best, num_sequences=128), "128 windows"),
        Row("RTN", replace(rtn, **small)),
        Row("GPTQ", replace(best, **small)),
        Row("GPTQ", DEFAULT_SETTINGS, "default model"),
        Row("GPTQ", replace(DEFAULT_SETTINGS, embedding_bits=8), "default model"),
        Row("RTN", replace(rtn, bits=3)),
        Row("GPTQ", replace(best, bits=3)),
        Row("RTN", replace(rtn, bits=3, **small)),
        Row("GPTQ", replace(best, bits=3, **small)),
        Row("RTN", replace(rtn, bits=2, **small)),
        Row("GPTQ", replace(best, bits=2, **small)),
    ]


def remarks(row: Row, settings: QuantizationSettings) -> str:
    """What sets a row apart from others of its bits and group size."""
    words = [ORDERS[settings.act_order]]
    if settings.asymmetric:
        words.append(f"asymmetric {settings.asymmetric:g}")
    if row.method == "RTN" and settings.clip_search:
        words.append("clip search")
    words += [f"{bits} bits for `{rule}`" for rule, bits in settings.layer_bits.items()]
    words += [f"{settings.head_bits}-bit head"] if settings.head_bits else []
    words += [f"{settings.embedding_bits}-bit embedding"] if settings.embedding_bits else []
    return ", ".join(filter(None, (row.remark, *words)))


def measure(model: Path, row: Row, threads: int, folder: Path) -> dict[str, Any]:
    """Quantise and measure; to be run in a process of its own, whose peak memory is then that of quantising."""
    torch.set_num_threads(threads)
    path, start = model, time.process_time()
    if row.settings is not None:
        path = folder / "model"
        if row.method == "RTN":
            save_rounded(model, path, row.settings)
        else:
            quantize_model(model, path, row.settings, use_tqdm=False)
    result: dict[str, Any] = {"cpu_seconds": time.process_time() - start, "threads": threads}
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    result["bytes"] = file_bytes(path)
    result["perplexity"] = perplexity(
        path, load_source(model).tokenizer.encode(held_out_text())[:TOKENS], window=WINDOW
    )
    return result


def file_bytes(model: Path) -> int:
    """Size of the weights."""
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return sum(file.stat().st_size for file in files)


def save_rounded(model: Path, path: Path, settings: QuantizationSettings) -> None:
    """Round every linear layer to nearest."""
    source = load_source(model)
    options = {name: getattr(settings, name) for name in ("bits", "group_size", "symmetric", "clip_search")}
    tensors: dict[str, torch.Tensor] = {}
    for index in range(source.config.num_layers):
        for name in (f"model.layers.{index}.{name}" for stage in STAGES for name in stage):
            rounded = round_to_nearest(source.tensor(f"{name}.weight"), **options)
            tensors |= {f"{name}.{part}": tensor for part, tensor in rounded.tensors().items()}
    save_model(path, source, tensors, asdict(settings))


def markdown(model: Path, table: list[Row], results: dict[Row, dict[str, Any]]) -> str:
    """The whole document, with the rows that there are."""
    first = next(row.settings for row in table if row.method == "GPTQ" and row.settings)
    text = f"""# What quantisation costs

Made by `make quality` from {model.name}, dequantised: no registry of packages holds the
unquantised model, so the file stands for it. A grid like the file's own flatters rounding: Q4_1 has blocks of 32
with minima of their own, and groups of 32 here nearly fall on them.

Perplexity is that of the weights (fp32 arithmetic) on the first {TOKENS} tokens of held-out Wikipedia articles, in
windows of {WINDOW}. Calibration: {first.num_sequences} windows of {first.sequence_length} tokens from other articles
({DEFAULT_SETTINGS.num_sequences} for the default model). All grids have zero points, and those of GPTQ are chosen by
clip search; its dampening is 0.05. Embedding and head stay in fp16 where nothing else is said; else their grids are
symmetric and plain, and the head's dampening is 0.01. Groups of 128 do not
divide the 576 inputs of SmolLM2. MB are those of the file of weights; CPU time and peak memory are those of
quantising, with one thread unless more are named.

| method | bits | group | | perplexity | log-perplexity lost | MB | CPU time | peak memory |
|---|---|---|---|---|---|---|---|---|
"""
    lines = []
    for row, result in results.items():
        cells = [row.method, *[""] * 3, f"{result['perplexity']:.2f}", "", f"{result['bytes'] / 1e6:.1f}", "", ""]
        if row.settings is not None:
            loss = math.log(result["perplexity"] / results[table[0]]["perplexity"])
            cells[1:4] = [str(row.settings.bits), str(row.settings.group_size), remarks(row, row.settings)]
            cells[5] = f"{loss:.4f}"
            threads = "" if result["threads"] == 1 else f", {result['threads']} threads"
            cells[7:] = [f"{result['cpu_seconds']:.0f} s{threads}", f"{result['peak_bytes'] / 1e9:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    return text + "\n".join(lines) + "\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a .gguf file or an unquantised folder; SmolLM2 without it")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="where finished rows are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/quality.md"))
    arguments = parser.parse_args()
    model = arguments.model or default_model()
    cache = arguments.cache or cache_folder() / "quality.json"
    known: dict[str, dict[str, Any]] = json.loads(cache.read_text()) if cache.exists() else {}
    table = rows(load_source(model), arguments.windows)
    for row in sorted(table, key=lambda row: row.method == "GPTQ"):  # those that take seconds first
        key = row.key(model)
        if key not in known:
            with tempfile.TemporaryDirectory() as folder, worker() as pool:
                known[key] = pool.submit(measure, model, row, arguments.threads, Path(folder)).result()
            partial = cache.with_suffix(".partial")
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(cache)
        results = {row: known[key] for row in table if (key := row.key(model)) in known}
        arguments.out.write_text(markdown(model, table, results), encoding="utf-8")
        name = f"{row.settings.bits} bits, {remarks(row, row.settings)}" if row.settings else ""
        print(f"{row.method} {name}: perplexity {known[row.key(model)]['perplexity']:.3f}", flush=True)


def worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    main()
