"""What pruning costs in quality: perplexity of SmolLM2-135M-Instruct after each method, as a table.

Calibration is that of the default 4-bit model; the text is held out (see teco_kernels.assets). Results are kept in
`--folder` after each model, so that an interrupted run goes on where it stopped. All of them take about half an hour of
CPU time.

    python bench/pruning.py --folder pruning/ --threads 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from teco_kernels.assets import default_model, held_out_text
from teco_kernels.decoder.loader import load_source
from teco_kernels.quantization import PruningSettings, QuantizationSettings, prune_model, quantize_model
from teco_kernels.quantization.default import DEFAULT_SETTINGS
from teco_kernels.quantization.perplexity import perplexity
from teco_kernels.quantization.sparsity import Sparsity

WINDOW, TOKENS = 1024, 8192


def rows() -> dict[str, PruningSettings | QuantizationSettings | None]:
    """What is measured, by name."""
    calibration = {name: getattr(DEFAULT_SETTINGS, name) for name in ("dampening", "num_sequences", "sequence_length")}
    methods: dict[str, Any] = {"SparseGPT": "sparsegpt", "Wanda": "wanda", "magnitude": "magnitude"}
    table: dict[str, PruningSettings | QuantizationSettings | None] = {"not pruned": None}
    for sparsity in (0.5, "2:4"):
        for name, method in methods.items():
            table[f"{Sparsity.parse(sparsity)}, {name}"] = PruningSettings(sparsity, method, **calibration)
    for sparsity in ("2:4", 0.5):
        table[f"{Sparsity.parse(sparsity)}, SparseGPT with 4 bits"] = replace(DEFAULT_SETTINGS, sparsity=sparsity)
    table["4 bits"] = DEFAULT_SETTINGS
    table["4:8, SparseGPT"] = PruningSettings("4:8", "sparsegpt", **calibration)
    return table


def measure(settings: PruningSettings | QuantizationSettings | None, folder: Path, tokens: list[int]) -> dict[str, Any]:
    """Make the model, measure it, and delete it."""
    source, out, start = default_model(), folder / "model", time.process_time()
    shutil.rmtree(out, ignore_errors=True)
    error = 0.0
    if isinstance(settings, PruningSettings):
        pruned = prune_model(source, out, settings)
        error = sum(report.error for report in pruned) / len(pruned)
    elif settings is not None:
        quantised = [report for report in quantize_model(source, out, settings) if report.name != "lm_head"]
        error = sum(report.error for report in quantised) / len(quantised)
    seconds = time.process_time() - start
    result = perplexity(out if settings else source, tokens, window=WINDOW)
    shutil.rmtree(out, ignore_errors=True)
    return {"perplexity": result, "error": error, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the results, and the model at work")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    tokens = load_source(default_model()).tokenizer.encode(held_out_text())[:TOKENS]

    file = options.folder / "results.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, settings in rows().items():
        what = None if settings is None else asdict(settings)
        if options.only in name and done.get(name, {}).get("settings", 0) != what:
            done[name] = {"settings": what, **measure(settings, options.folder, tokens)}
            file.write_text(json.dumps(done, indent=2))
            print(f"{name}: {done[name]['perplexity']:.2f}", flush=True)

    base = done.get("not pruned", {}).get("perplexity", float("nan"))
    print("\n| model | mean error of layers | perplexity | above the source | CPU seconds |\n|---|---|---|---|---|")
    for name in (name for name in rows() if name in done):
        row = done[name]
        above = f"{row['perplexity'] / base - 1:.1%}"
        print(f"| {name} | {row['error']:.1%} | {row['perplexity']:.2f} | {above} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
