"""vLLM on the same model: as it is (fp32, bf16), with our attention, or with that on our GPTQ checkpoint.

Any variant with "-eager" behind it is not compiled, which spares minutes at the start.
"""

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

    name = sys.argv[2] if len(sys.argv) > 2 else "bf16"
    variant = name.removesuffix("-eager")
    if variant not in VARIANTS:
        raise SystemExit(f"expected one of {', '.join(VARIANTS)}, got {variant!r}")
    options = {"enforce_eager": name != variant, "enable_prefix_caching": False}
    if variant not in ("fp32", "bf16"):
        options["attention_config"] = {"backend": "CUSTOM"}
    if variant.startswith("gptq"):
        path = default_quantized_model()
        options["quantization"] = "teco_gptq"
    else:
        path = dense_copy(default_model(), Path(tempfile.gettempdir()) / "teco_kernels_bench_dense")
    llm = vllm.LLM(str(path), dtype=VARIANTS[variant], max_model_len=1024, max_num_seqs=16, **options)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    serve(f"{vllm.__version__}, {name}", generate)


if __name__ == "__main__":
    main()
