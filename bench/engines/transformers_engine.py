"""transformers on the same model, dequantised to fp32."""

from __future__ import annotations

import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from worker import serve

from teco_kernels.assets import default_model
from teco_kernels.decoder.loader import load_source

torch.set_num_threads(int(sys.argv[1]))
source = load_source(default_model())
config = AutoConfig.for_model(**source.raw_config)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
model.load_state_dict({name: source.tensor(name).float() for name in source.names()}, strict=False)


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


serve(f"{transformers.__version__}, fp32", generate)
