"""Generates with vLLM in a process of its own, for test_vllm.py: options as JSON in, tokens and counts as JSON out."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

PROMPTS = ["The capital of France is", "Once upon a time", "def fib(n):"]


def _our_layers(model: Any) -> list[str]:
    """Kinds of the model's layers that run as `forward_ours`."""
    forwards = (getattr(module, "_forward_method", None) for module in model.modules())
    ours = (method.__self__ for method in forwards if getattr(method, "__name__", "") == "forward_ours")
    return sorted({layer.name for layer in ours})


def main() -> None:
    import vllm

    from teco_kernels.ops import kernel_calls

    llm = vllm.LLM(max_model_len=256, max_num_seqs=4, **json.loads(sys.argv[1]))
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    counted = ("paged_attention", "reshape_and_cache", "gptq_matmul")
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "calls": {name: kernel_calls(name) for name in counted},
        "layers": llm.apply_model(_our_layers)[0],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
