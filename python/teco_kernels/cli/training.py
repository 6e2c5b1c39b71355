"""Commands that train: a recycle head beside a model, and a small model together with its head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from teco_kernels.cli.command import Threads, app, check_picture, set_threads
from teco_kernels.cli.model import Model


@app.command()
def train_recycle(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to record, prompts included.")] = 1_000_000,
    validation_tokens: Annotated[int, typer.Option(min=1, help="Further ones, for validation.")] = 40_000,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens with which a prompt is continued.")] = 192,
    recording: Annotated[
        Path | None, typer.Option(help="A folder to keep the recording in, or to take it from.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the head.")] = 1,
    hidden_size: Annotated[int, typer.Option(help="Width of its layers; 0: the model's.")] = 0,
    intermediate_size: Annotated[int, typer.Option(help="Width of their MLPs; 0: the model's.")] = 0,
    draft_vocab_size: Annotated[int, typer.Option(help="Most frequent tokens that it is trained with; 0: all.")] = 8192,
    epochs: Annotated[float, typer.Option(help="How often each recorded text is seen.")] = 3.0,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step of training.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 1e-3,
    dropout: Annotated[float, typer.Option(help="Of what its layers add.")] = 0.1,
    seed: Annotated[int, typer.Option(help="The same seed trains the same head.")] = 0,
    said_vocab_size: Annotated[int, typer.Option(help="Most frequent ones that the saved head says; 0: all.")] = 4096,
    bits: Annotated[int, typer.Option(help="Bits of the saved head: 2, 3, 4, 8; 16 for fp16.")] = 4,
    png_file: Annotated[Path | None, typer.Option("--png", help="Also draw the course; needs matplotlib.")] = None,
    threads: Threads = None,
) -> None:
    """Distil a recycle head from what a model writes. Interrupted, the same command goes on where it was."""
    from teco_kernels.cli import tables
    from teco_kernels.training import TrainingSettings
    from teco_kernels.training import train_recycle as train
    from teco_kernels.training.distil import draw

    if not model.exists():
        raise FileNotFoundError(2, "No such file or directory", str(model))
    check_picture(png_file)
    set_threads(threads)
    settings = TrainingSettings(
        num_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        draft_vocab_size=draft_vocab_size,
        epochs=epochs,
        tokens_per_step=tokens_per_step,
        learning_rate=learning_rate,
        dropout=dropout,
        seed=seed,
    )
    try:
        history, acceptance = train(
            model,
            out,
            settings,
            num_tokens=tokens,
            num_validation_tokens=validation_tokens,
            max_new_tokens=max_new_tokens,
            recording=recording,
            said_vocab_size=said_vocab_size,
            bits=None if bits == 16 else bits,
        )
    except KeyboardInterrupt:
        typer.echo("\nteco-kernels: interrupted; the same command goes on where it was", err=True)
        raise
    shares = acceptance.shares()
    size = sum(file.stat().st_size for file in out.iterdir())
    rows = [
        ("head alone", f"{shares['head']:.3f}", f"of {acceptance.places} tokens that the model wrote"),
        ("lookup alone", f"{shares['lookup']:.3f}", f"it has something to say for {shares['matches']:.1%}"),
        ("lookup, else head", f"{shares['either']:.3f}", f"the head there {shares['head_elsewhere']:.3f}"),
        ("draft vocabulary", f"{shares['known']:.1%}", "of these tokens are in it"),
        ("trained", f"{history[-1].minutes:.1f} min", f"loss {history[-1].validation_loss:.3f} on unseen texts"),
        ("written to", str(out), tables.size(size)),
    ]
    console = Console()
    console.print(tables.run_table(rows))
    if png_file:
        draw(history, f"Recycle head for {model.name}", png_file)
        console.print(f"picture: {png_file}", highlight=False, markup=False)


@app.command()
def train_joint(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file, or several; articles of Wikipedia when not given.")
    ] = None,
    characters: Annotated[int, typer.Option(min=0, help="Of the texts, at most about so many; 0: all.")] = 0,
    recycle_weight: Annotated[float, typer.Option(help="Of the recycle loss; 0: the model alone.")] = 1.0,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 2048,
    hidden_size: Annotated[int, typer.Option(help="Width of model and head.")] = 128,
    intermediate_size: Annotated[int, typer.Option(help="Width of their MLPs.")] = 384,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    heads: Annotated[int, typer.Option(help="Heads of attention.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values.")] = 2,
    head_layers: Annotated[int, typer.Option(help="Layers of the recycle head.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of a text.")] = 256,
    epochs: Annotated[float, typer.Option(help="How often each text is seen.")] = 1.0,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step of training.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 3e-3,
    dropout: Annotated[float, typer.Option(help="Of what layers add.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed trains the same model.")] = 0,
    png_file: Annotated[Path | None, typer.Option("--png", help="Also draw the course; needs matplotlib.")] = None,
    threads: Threads = None,
) -> None:
    """Train a small model from scratch together with its recycle head. Interrupted, it goes on where it was."""
    from teco_kernels.assets import calibration_articles
    from teco_kernels.cli import tables
    from teco_kernels.training import JointSettings
    from teco_kernels.training import train_joint as train
    from teco_kernels.training.distil import draw
    from teco_kernels.training.pretrain import beginning

    check_picture(png_file)
    set_threads(threads)
    settings = JointSettings(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_layers=head_layers,
        context=context,
        recycle_weight=recycle_weight,
        epochs=epochs,
        tokens_per_step=tokens_per_step,
        learning_rate=learning_rate,
        dropout=dropout,
        seed=seed,
    )
    texts: Sequence[str] = calibration_articles() if text is None else _paragraphs(text)
    if characters:
        texts = beginning(texts, characters)
    try:
        history, figures = train(texts, out, settings)
    except KeyboardInterrupt:
        typer.echo("\nteco-kernels: interrupted; the same command goes on where it was", err=True)
        raise
    rows = [("perplexity", f"{figures['perplexity']:.2f}", "of the next token, on texts for validation")]
    if "acceptance" in figures:
        rows += [
            ("recycled", f"{figures['recycle_perplexity']:.2f}", "perplexity of the token after that, by the head"),
            ("acceptance", f"{figures['acceptance']:.3f}", "of what the head says is what the model will say"),
        ]
    rows += [
        ("trained", f"{history[-1].minutes:.1f} min", f"{len(texts)} texts"),
        ("written to", str(out), tables.size(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))),
    ]
    console = Console()
    console.print(tables.run_table(rows))
    if png_file:
        draw(history, "A model and its recycle head, trained together", png_file)
        console.print(f"picture: {png_file}", highlight=False, markup=False)


def _paragraphs(files: list[Path]) -> list[str]:
    """The texts of files: parts between empty lines."""
    return [part for file in files for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
