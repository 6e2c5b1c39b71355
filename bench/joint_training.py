"""RecycleGPT's comparison on a tiny model: does learning to recycle cost the model anything, and what is it worth?

Trains the same model twice from scratch on Wikipedia, with the next token's loss alone and with the recycle loss beside
it, and distils a head from the first one, as `train-recycle` does. Then each continues held-out articles greedily,
plainly and strictly recycled (`recycle_verify=False`), in turns. One seed of each, and the heads do not see the same
number of tokens (the reports have them): the table shows sizes, not small differences.

    python bench/joint_training.py build/joint
    python bench/joint_training.py build/joint-2 --head-layers 2 --characters 4000000
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from prompts import spread
from rich.console import Console
from rich.table import Table

from teco_kernels import LLM, SamplingParams
from teco_kernels.assets import calibration_articles, held_out_text
from teco_kernels.decoder.recycle_head import CONFIG_NAME
from teco_kernels.training import JointSettings, TrainingSettings, train_joint, train_recycle
from teco_kernels.training.pretrain import HEAD_FOLDER, beginning
from teco_kernels.training.save import REPORT_NAME

_PROMPT_TOKENS, _NEW_TOKENS = 32, 128


def train(folder: Path, name: str, texts: Sequence[str], settings: JointSettings) -> Path:
    """The folder of a trained model, made when it is not there."""
    path = folder / name
    if not path.exists():
        train_joint(texts, path, settings)
    trained = json.loads((path / REPORT_NAME).read_text(encoding="utf-8"))["settings"]
    if trained != asdict(settings):
        raise SystemExit(f"{path}: trained with other settings; remove it, or take another folder")
    return path


def distil(model: Path, out: Path, head_layers: int, num_tokens: int) -> Path:
    """The folder of a head distilled from a model, made when it is not there."""
    if not (out / CONFIG_NAME).exists():
        settings = TrainingSettings(num_layers=head_layers, draft_vocab_size=0)
        train_recycle(
            model, out, settings, num_tokens=num_tokens, max_new_tokens=_NEW_TOKENS, said_vocab_size=0, bits=None
        )
    return out


def decode(model: Path, head: Path, prompts: list[str], num_threads: int) -> dict[str, float]:
    """Speed-up of strict recycling, and the share of recycled tokens that the model would have said itself."""
    plain = LLM(model, num_threads=num_threads)
    strict = LLM(model, num_threads=num_threads, recycle_head=head, recycle_verify=False)
    params = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True)
    ids = [plain.tokenizer.encode(prompt)[:_PROMPT_TOKENS] for prompt in prompts]
    ratios = []
    for number, prompt in enumerate(ids):
        seconds = {}
        for llm in (plain, strict) if number % 2 else (strict, plain):
            started = time.perf_counter()
            llm.generate([prompt], params, use_tqdm=False)
            seconds[llm] = time.perf_counter() - started
        ratios.append(seconds[plain] / seconds[strict])
    counts = strict.metrics()
    return {
        "speedup": statistics.median(ratios[1:]),
        "accepted": counts["accepted_tokens"] / counts["guessed_tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for models and heads; those that are there are used")
    parser.add_argument("--characters", type=int, default=12_000_000, help="of text to train on")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--head-layers", type=int, default=1)
    parser.add_argument("--distil-tokens", type=int, default=500_000)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    texts = beginning(calibration_articles(), options.characters)
    settings = JointSettings(head_layers=options.head_layers, epochs=options.epochs)
    options.folder.mkdir(parents=True, exist_ok=True)
    alone = train(options.folder, "alone", texts, replace(settings, recycle_weight=0.0))
    joint = train(options.folder, f"joint-{options.head_layers}", texts, settings)
    distilled = distil(
        alone, options.folder / f"head-{options.head_layers}", options.head_layers, options.distil_tokens
    )

    paragraphs = [text for text in held_out_text().split("\n\n") if len(text) > 400]
    prompts = spread(paragraphs, options.prompts)
    table = Table("model", "head", "perplexity", "of the recycled token", "recycled as the model", "strict, speed-up")
    for name, model, beside in (("next token", alone, distilled), ("both losses", joint, joint / HEAD_FOLDER)):
        report = json.loads((model / REPORT_NAME).read_text(encoding="utf-8"))
        figures = decode(model, beside, prompts, options.threads)
        recycled = report.get("recycle_perplexity")
        table.add_row(
            name,
            "distilled afterwards" if model == alone else "trained along",
            f"{report['perplexity']:.2f}",
            f"{recycled:.2f}" if recycled else "",
            f"{figures['accepted']:.3f}",
            f"{figures['speedup']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
