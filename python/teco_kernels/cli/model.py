"""Commands about a model: run it, talk with it, measure its perplexity, quantise it, prune it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from teco_kernels.cli.command import Threads, UsageError, app, check_picture, report_error, set_threads

if TYPE_CHECKING:
    from teco_kernels.decoder.llm import LLM
    from teco_kernels.decoder.sampling_params import RequestOutput, SamplingParams

Model = Annotated[Path, typer.Argument(help="A Hugging Face folder (plain, GPTQ or AWQ) or a .gguf file.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens that hold this share.")]
TopK = Annotated[int, typer.Option(help="Draw among this many of the likeliest tokens; 0: all.")]
MinP = Annotated[float, typer.Option(help="Draw among tokens at least this times as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that have occurred become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]
Dtype = Annotated[str, typer.Option(help="Of activations: auto, float32, float16, bfloat16.")]
MaxModelLen = Annotated[int | None, typer.Option(min=1, help="Most tokens of prompt and answer.")]
CacheDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="auto, fp32, fp16, bf16, int8, fp8; or as vLLM calls them.")
]
CacheMemory = Annotated[int | None, typer.Option("--kv-cache-memory", min=1, help="Bytes for the KV cache.")]
Activation = Annotated[Literal["int8", "exact"], typer.Option(help="How GPTQ layers treat their input.")]

RecycleHead = Annotated[
    str,
    typer.Option(
        help="How tokens to come are guessed, which the model then verifies: auto (the head that is shipped for the "
        "model, if any, and lookup), lookup (in the text so far), the folder of a head, or none."
    ),
]
Ranks = Annotated[
    int, typer.Option("--tensor-parallel-size", min=1, help="Processes that share the model, each with a part.")
]
Dampening = Annotated[float, typer.Option(help="Added to the Hessian's diagonal, as a share of its mean.")]
Calibration = Annotated[
    Path | None, typer.Option(help="A text like that which the model will see; Wikipedia articles otherwise.")
]
NumSequences = Annotated[int, typer.Option(min=1, help="Windows of that text to look at.")]
SequenceLength = Annotated[int, typer.Option(min=1, help="Tokens of a window.")]
Sparsity = Annotated[str | None, typer.Option(help="A share of weights to prune, or 2:4, 4:8: so many of them stay.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from stdin.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end of text.")] = False,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    kv_cache_dtype: CacheDtype = "auto",
    kv_cache_memory: CacheMemory = None,
    recycle_head: RecycleHead = "auto",
    gptq_activation: Activation = "int8",
    tensor_parallel_size: Ranks = 1,
    threads: Threads = None,
) -> None:
    """Go on from a prompt, printing text as it comes."""
    from teco_kernels.decoder.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    llm = load_model(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=1,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        recycle_head=None if recycle_head == "none" else recycle_head,
        gptq_activation=gptq_activation,
        tensor_parallel_size=tensor_parallel_size,
        num_threads=threads,
    )
    _stream(llm, sys.stdin.read() if prompt == "-" else prompt, params)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    kv_cache_dtype: CacheDtype = "auto",
    kv_cache_memory: CacheMemory = None,
    recycle_head: RecycleHead = "auto",
    gptq_activation: Activation = "int8",
    tensor_parallel_size: Ranks = 1,
    threads: Threads = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D ends; /new forgets what was said."""
    from teco_kernels.decoder.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    llm = load_model(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=1,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        recycle_head=None if recycle_head == "none" else recycle_head,
        gptq_activation=gptq_activation,
        tensor_parallel_size=tensor_parallel_size,
        num_threads=threads,
    )
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := _read_line()) is not None:
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _stream(llm, llm.chat_prompt(messages), params, interruptible=True)
            except ValueError as error:  # such as a conversation that has grown too long: /new helps, or a shorter line
                report_error(error)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer.outputs[0].text if answer else ""})


@app.command()
def score(
    model: Model,
    file: Annotated[Path, typer.Argument(help="A text file; - reads stdin.")],
    window: Annotated[int | None, typer.Option(min=2, help="Most tokens of context and text at a time.")] = None,
    max_chars: Annotated[int | None, typer.Option(min=1, help="Only the beginning of the text.")] = None,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    kv_cache_dtype: CacheDtype = "auto",
    gptq_activation: Activation = "int8",
    tensor_parallel_size: Ranks = 1,
    threads: Threads = None,
) -> None:
    """Measure the perplexity of a text."""
    import math
    import time

    from teco_kernels.cli import tables

    text = (sys.stdin.read() if str(file) == "-" else _read_text(file))[:max_chars]
    llm = load_model(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=1,
        kv_cache_dtype=kv_cache_dtype,
        gptq_activation=gptq_activation,
        tensor_parallel_size=tensor_parallel_size,
        num_threads=threads,
    )
    start = time.monotonic()
    scores = llm.score(text, window=window)
    seconds = time.monotonic() - start
    if not scores:
        raise ValueError(f"{file}: expected at least two tokens of text")
    mean = sum(scores) / len(scores)
    rows = [
        ("perplexity", f"{math.exp(-mean):.4f}", f"mean log-probability {mean:.4f}"),
        ("tokens", str(len(scores)), f"{len(scores) / seconds:.0f} per second"),
    ]
    Console().print(tables.run_table(rows))


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="An unquantised Hugging Face folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="One zero point for all.")] = True,
    act_order: Annotated[
        Literal["none", "full", "static_groups", "group_aware"],
        typer.Option(help="Quantise the largest activations first; all but full keep neighbours in a group."),
    ] = "none",
    clip_search: Annotated[bool, typer.Option("--clip-search", help="Try narrower grids too.")] = False,
    dampening: Dampening = 0.01,
    asymmetric: Annotated[
        float, typer.Option(help="From 0 to 1: how much of the error of earlier layers a layer makes up for.")
    ] = 0.0,
    refine_sweeps: Annotated[int, typer.Option(help="Passes over the codes after GPTQ.")] = 0,
    layer_bits: Annotated[
        list[str] | None, typer.Option(help="REGEX=BITS for the layers it matches; may be given several times.")
    ] = None,
    sparsity: Sparsity = None,
    head_bits: Annotated[int, typer.Option(help="Bits of the language-model head; 0 leaves it as it is.")] = 8,
    embedding_bits: Annotated[
        int, typer.Option(help="Bits of the embedding; 0 keeps it. Other tools do not load a quantised one.")
    ] = 0,
    head_group_size: Annotated[int, typer.Option(help="Inputs per group of head and embedding; -1: all.")] = 64,
    calibration: Calibration = None,
    num_sequences: NumSequences = 64,
    sequence_length: SequenceLength = 512,
    png_file: Annotated[Path | None, typer.Option("--png", help="Also draw the errors; needs matplotlib.")] = None,
    threads: Threads = None,
) -> None:
    """Quantise a model with GPTQ. Interrupted, the same command goes on where it was."""
    from teco_kernels.cli import tables
    from teco_kernels.quantization import QuantizationSettings, quantize_model, report

    if not source.exists():
        raise FileNotFoundError(2, "No such file or directory", str(source))
    check_picture(png_file)
    text = None if calibration is None else _read_text(calibration)
    set_threads(threads)
    settings = QuantizationSettings(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order={"none": False, "full": True}.get(act_order, act_order),  # type: ignore[arg-type]
        clip_search=clip_search,
        dampening=dampening,
        asymmetric=asymmetric,
        refine_sweeps=refine_sweeps,
        layer_bits=dict(map(_rule, layer_bits or ())),
        sparsity=sparsity,
        head_bits=head_bits or None,
        embedding_bits=embedding_bits or None,
        head_group_size=head_group_size,
        num_sequences=num_sequences,
        sequence_length=sequence_length,
    )
    try:
        layers = quantize_model(source, out, settings, calibration=text)
    except KeyboardInterrupt:
        typer.echo("\nteco-kernels: interrupted; the same command goes on with the layer that it was at", err=True)
        raise
    worst = max(layers, key=lambda layer: layer.error)
    mean, rounding = (sum(getattr(layer, n) for layer in layers) / len(layers) for n in ("error", "rounding_error"))
    before, after = (sum(f.stat().st_size for f in _files(path)) for path in (source, out))
    rows = [
        ("size", tables.size(after), f"was {tables.size(before)}"),
        ("matrices", str(len(layers)), f"mean error of their outputs {mean:.2%}, by rounding alone {rounding:.2%}"),
        ("worst", f"{worst.error:.2%}", worst.name),
        ("written to", str(out), ""),
    ]
    console = Console()
    console.print(tables.quantization_table(layers), tables.run_table(rows))
    if png_file:
        report.draw(layers, f"{source.name}, {bits} bits, groups of {group_size}", png_file)
        console.print(f"picture: {png_file}", highlight=False, markup=False)


@app.command()
def prune(
    source: Annotated[Path, typer.Argument(help="An unquantised Hugging Face folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    sparsity: Annotated[str, typer.Option(help="A share of weights to prune, or 2:4, 4:8: so many stay.")] = "2:4",
    method: Annotated[
        Literal["sparsegpt", "wanda", "magnitude"], typer.Option(help="How to choose them.")
    ] = "sparsegpt",
    dampening: Dampening = 0.01,
    calibration: Calibration = None,
    num_sequences: NumSequences = 64,
    sequence_length: SequenceLength = 512,
    threads: Threads = None,
) -> None:
    """Prune a model; with `quantize --sparsity`, prune and quantise it in one pass."""
    from teco_kernels.cli import tables
    from teco_kernels.quantization import PruningSettings, prune_model

    if not source.exists():
        raise FileNotFoundError(2, "No such file or directory", str(source))
    text = None if calibration is None else _read_text(calibration)
    set_threads(threads)
    settings = PruningSettings(sparsity, method, dampening, num_sequences, sequence_length)
    layers = prune_model(source, out, settings, calibration=text)
    worst = max(layers, key=lambda layer: layer.error)
    mean, zeros = (sum(getattr(layer, n) for layer in layers) / len(layers) for n in ("error", "sparsity"))
    rows = [
        ("matrices", str(len(layers)), f"{zeros:.1%} of their weights are 0, mean error of their outputs {mean:.2%}"),
        ("worst", f"{worst.error:.2%}", worst.name),
        ("written to", str(out), ""),
    ]
    Console().print(tables.run_table(rows))


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument()] = "The capital of France is Paris, and the capital of Germany is",
    max_tokens: MaxTokens = 64,
    threads: Threads = None,
) -> None:
    """Fetch a small model, quantise it to 4 bits (both once), generate, and tell what it took."""
    from teco_kernels.cli import tables
    from teco_kernels.decoder.sampling_params import SamplingParams
    from teco_kernels.quantization import default_quantized_model
    from teco_kernels.testing import machine

    path = default_quantized_model()
    before, _ = machine.process_memory()
    llm = load_model(path, max_num_seqs=1, num_threads=threads, recycle_head="auto")
    typer.secho(prompt, nl=False, bold=True)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    output = _stream(llm, prompt, params)
    if output:
        prompt_row, *_ = _speed_rows(output)
        rows = [prompt_row, *_compare_recycling(llm, prompt, params), *_memory_rows(llm, before)]
        Console().print("", tables.run_table(rows))


def load_model(path: Path, **options: Any) -> LLM:
    """The model, with a word on stderr while a person waits for it."""
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    from teco_kernels.decoder.llm import LLM

    with Console(stderr=True).status(f"loading {path.name}"):
        return LLM(path, **options)


def _stream(
    llm: LLM, prompt: str | list[int], params: SamplingParams, *, interruptible: bool = False
) -> RequestOutput | None:
    """Print an answer as it comes, and return it; Ctrl-C may end it early."""
    output = None
    stream = llm.stream(prompt, params)
    try:
        for output in stream:
            typer.echo(output.outputs[0].new_text, nl=False)
    except KeyboardInterrupt:
        if not interruptible:
            raise
    finally:
        typer.echo("")
        stream.close()  # type: ignore[attr-defined]
    return output


def _read_line() -> str | None:
    """What the user types next; None at the end, by Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and keys to edit with)
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo("")
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from None


def _rule(text: str) -> tuple[str, int]:
    """The two sides of REGEX=BITS."""
    rule, _, bits = text.rpartition("=")
    if not rule or not bits.isdecimal():
        raise UsageError(f"--layer-bits: expected REGEX=BITS, got {text!r}")
    return rule, int(bits)


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _speed_rows(output: RequestOutput) -> list[tuple[str, str, str]]:
    metrics, answer = output.metrics, output.outputs[0]
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    computed = len(output.prompt_token_ids) - metrics.num_cached_tokens
    prefill = metrics.first_token_time - metrics.arrival_time
    decode, steps = metrics.finished_time - metrics.first_token_time, len(answer.token_ids) - 1
    rows = [("prompt", f"{computed / prefill:.0f} tokens/s", f"{computed} tokens in {prefill * 1e3:.0f} ms")]
    if steps:
        rows.append(("answer", f"{steps / decode:.0f} tokens/s", f"{steps} tokens in {decode * 1e3:.0f} ms"))
    return rows


def _compare_recycling(llm: LLM, prompt: str, params: SamplingParams) -> list[tuple[str, str, str]]:
    """An answer's speed by plain and by recycled decoding, each with all that earlier runs of it have taught.

    RuntimeError when the texts differ.
    """
    engine, recycler = llm.engine, llm.engine.recycler
    answers = []
    rows = []
    try:
        for name, engine.recycler in (("plain", None), ("recycled", recycler)):
            llm.generate(prompt, params, use_tqdm=False)
            steps = llm.metrics()["steps"]
            (output,) = llm.generate(prompt, params, use_tqdm=False)
            answers.append(output.outputs[0].token_ids)
            speed = _speed_rows(output)[1:]
            rows += [
                (f"answer, {name}", value, f"{text}, {llm.metrics()['steps'] - steps} steps")
                for _, value, text in speed
            ]
    finally:
        engine.recycler = recycler
    if answers[0] != answers[1]:
        raise RuntimeError("recycled decoding gave another text than plain decoding")
    return rows


def _memory_rows(llm: LLM, before: int) -> list[tuple[str, str, str]]:
    """The process's memory and what it went into; `before`: bytes it had when the model was not yet loaded."""
    from teco_kernels.cli.tables import size
    from teco_kernels.testing import machine

    metrics = llm.metrics()
    block_bytes = metrics["kv_cache_bytes"] / metrics["kv_blocks"]
    cache = metrics["kv_blocks_peak"] * block_bytes
    tokens = metrics["kv_blocks_peak"] * metrics["kv_block_size"]
    resident, peak = machine.process_memory()
    rest = resident - before - cache - metrics["weight_bytes"]
    return [
        ("weights", size(metrics["weight_bytes"]), ""),
        ("KV cache", size(cache), f"{tokens} slots at the most, {metrics['kv_waste_share']:.1%} of them empty"),
        ("before", size(before), "Python and torch, before the model was loaded"),
        ("process", size(resident), f"all of these and {size(max(rest, 0))} more; peak {size(peak)}"),
    ]
