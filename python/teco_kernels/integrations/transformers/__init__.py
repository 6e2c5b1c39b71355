"""transformers over these operators: the attention "teco_paged", GPTQ checkpoints, and one call for a model.

::

    from teco_kernels.integrations.transformers import accelerate, enable_gptq

    enable_gptq()  # before from_pretrained, for a GPTQ checkpoint
    model = accelerate(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
"""

from __future__ import annotations

from teco_kernels.integrations.transformers.attention import ATTENTION, register_attention
from teco_kernels.integrations.transformers.gptq import GPTQLinear, enable_gptq
from teco_kernels.integrations.transformers.model import accelerate

register_attention()

__all__ = ["ATTENTION", "GPTQLinear", "accelerate", "enable_gptq"]
