"""transformers on the same model: as it is (fp32, bf16), with our attention and norms, or on our GPTQ checkpoint."""

from __future__ import annotations

import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from worker import serve

from teco_kernels.assets import default_model
from teco_kernels.decoder.loader import load_source

VARIANTS = "fp32", "bf16", "attention", "gptq"
variant = sys.argv[2] if len(sys.argv) > 2 else "fp32"
if variant not in VARIANTS:
    raise SystemExit(f"expected one of {', '.join(VARIANTS)}, got {variant!r}")
torch.set_num_threads(int(sys.argv[1]))
if variant == "gptq":
    from teco_kernels.integrations.transformers import enable_gptq
    from teco_kernels.quantization import default_quantized_model

    enable_gptq()
    model = AutoModelForCausalLM.from_pretrained(default_quantized_model(), dtype=torch.float32).eval()
else:
    source = load_source(default_model())
    config = AutoConfig.for_model(**source.raw_config)
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.load_state_dict({name: source.tensor(name).to(dtype) for name in source.names()}, strict=False)
if variant in ("attention", "gptq"):
    from teco_kernels.integrations.transformers import accelerate

    accelerate(model)


def generate(prompts: list[list[int]], tokens: int) -> None:
    ids = torch.tensor(prompts)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


serve(f"{transformers.__version__}, {variant}", generate)
