"""vLLM on the same model: as it is (fp32, bf16), with our attention, or with that on our GPTQ checkpoint."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from worker import serve

VARIANTS = {"fp32": "float32", "bf16": "bfloat16", "attention": "bfloat16", "gptq": "float32", "gptq-bf16": "bfloat16"}


def main() -> None:
    import vllm
    from dense_copy import dense_copy

    from teco_kernels.assets import default_model
    from teco_kernels.quantization import default_quantized_model

    variant = sys.argv[2] if len(sys.argv) > 2 else "bf16"
    if variant not in VARIANTS:
        raise SystemExit(f"expected one of {', '.join(VARIANTS)}, got {variant!r}")
    options = {} if variant in ("fp32", "bf16") else {"attention_config": {"backend": "CUSTOM"}}
    if variant.startswith("gptq"):
        path = default_quantized_model()
        options["quantization"] = "teco_gptq"
    else:
        path = dense_copy(default_model(), Path(tempfile.gettempdir()) / "teco_kernels_bench_dense")
    llm = vllm.LLM(
        str(path), dtype=VARIANTS[variant], max_model_len=1024, max_num_seqs=16, enable_prefix_caching=False, **options
    )

    def generate(prompts: list[list[int]], tokens: int) -> None:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    serve(f"{vllm.__version__}, {variant}", generate)


if __name__ == "__main__":
    main()
