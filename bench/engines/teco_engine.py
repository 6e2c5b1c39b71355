"""This package on its default 4-bit model."""

from __future__ import annotations

import sys

from worker import serve

from teco_kernels import LLM, SamplingParams, __version__
from teco_kernels.quantization import default_quantized_model

llm = LLM(sys.argv[2] if len(sys.argv) > 2 else default_quantized_model(), num_threads=int(sys.argv[1]))


def generate(prompts: list[list[int]], tokens: int) -> None:
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)


serve(f"{__version__}, 4-bit GPTQ", generate)
