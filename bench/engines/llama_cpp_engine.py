"""llama.cpp through llama-cpp-python, on the model's GGUF file requantised to Q4_0, its fastest 4-bit format here."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from worker import PROMPT, serve

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
llm = llama_cpp.Llama(
    str(quantised), n_threads=threads, n_threads_batch=threads, n_ctx=2048, n_batch=512, verbose=False
)
prompt = llm.tokenize(PROMPT.encode(), add_bos=False)


def generate(batch: int, tokens: int) -> bool:
    if batch != 1:
        return False
    llm.reset()
    llm.eval(prompt)
    for _ in range(tokens - 1):
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), shape=(llm.n_vocab(),))
        llm.eval([int(row.argmax())])
    return True


serve(f"{llama_cpp.__version__}, Q4_0", generate)
