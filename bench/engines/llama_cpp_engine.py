"""llama.cpp through llama-cpp-python, on the model's GGUF file requantised to Q4_0, its fastest 4-bit format here."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from worker import serve

SEQUENCES = 16
threads = int(sys.argv[1])
silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p())
cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teco_kernels"
source = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
if not source.exists():
    raise SystemExit(f"{source}: expected the default model; `teco-kernels demo` fetches it")
quantised = Path(tempfile.gettempdir()) / "teco_kernels_bench_q4_0.gguf"
if not quantised.exists():
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    params.nthread = threads
    partial = quantised.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"{source}: llama.cpp could not requantise it")
    partial.replace(quantised)
model = llama_cpp.llama_model_load_from_file(str(quantised).encode(), llama_cpp.llama_model_default_params())
settings = llama_cpp.llama_context_default_params()
settings.n_threads = settings.n_threads_batch = threads
settings.n_seq_max, settings.n_ctx, settings.n_batch = SEQUENCES, SEQUENCES * 1024, 512
context = llama_cpp.llama_init_from_model(model, settings)
vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)


def decode(tokens: list[tuple[int, int, int]], wanted: set[int]) -> None:
    """Run (token, position, sequence) triples, with logits for the wanted ones of them."""
    batch.n_tokens = len(tokens)
    for index, (token, position, sequence) in enumerate(tokens):
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        batch.logits[index] = index in wanted
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama_decode failed")


def greedy(index: int) -> int:
    logits = llama_cpp.llama_get_logits_ith(context, index)
    return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())


def generate(prompts: list[list[int]], tokens: int) -> None:
    if len(prompts) > SEQUENCES:
        raise ValueError(f"at most {SEQUENCES} sequences")
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    fresh = []
    for sequence, prompt in enumerate(prompts):
        for start in range(0, len(prompt), settings.n_batch):
            part = prompt[start : start + settings.n_batch]
            decode([(token, start + i, sequence) for i, token in enumerate(part)], {len(part) - 1})
        fresh.append(greedy(len(part) - 1))
    for step in range(tokens - 1):
        line = [(token, len(prompts[i]) + step, i) for i, token in enumerate(fresh)]
        decode(line, set(range(len(line))))
        fresh = [greedy(index) for index in range(len(line))]


serve(f"{llama_cpp.__version__}, Q4_0", generate)
