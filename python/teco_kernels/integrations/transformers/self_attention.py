"""transformers' self-attention of a GPTQ checkpoint: projections of one input in one call, and our rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teco_kernels.decoder.weights import Linear
from teco_kernels.integrations.gradients import without_gradient
from teco_kernels.integrations.transformers.attention import attention
from teco_kernels.integrations.transformers.gptq import GPTQLinear
from teco_kernels.ops import rms_norm, rotary_embedding


class Angles:
    """A step's angles in the form that `rotary_embedding` takes; the layers of a model share them."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # what they were made of, and they

    def of(self, position_embeddings: tuple[Tensor, Tensor], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions ``[num_tokens]`` in a table fp32 ``[rows, rotary_dim]``, the cosines and sines that were given.

        ``cos, sin [batch, T, rotary_dim]`` hold every angle twice, and one row where all sequences have the same
        positions. The table is made anew when they are other tensors than the last time; `cos` is held, so that no
        later one takes its place in memory.
        """
        cos, sin = position_embeddings
        last = self._last  # read once: another thread may generate with the same model
        if last is None or last[0] is not cos or len(last[1]) != num_tokens:
            half = cos.shape[-1] // 2
            table = torch.cat((cos[..., :half], sin[..., :half]), dim=-1).flatten(0, 1).float()
            last = self._last = cos, torch.arange(num_tokens) % len(table), table
        return last[1], last[2]


class SelfAttention(torch.nn.Module):
    """In place of an attention whose projections are quantised.

    Parameters
    ----------
    module : Module
        ``LlamaAttention`` or another of its form, with biases, head norms and a window or without.
    angles : Angles
    """

    def __init__(self, module: Any, angles: Angles) -> None:
        super().__init__()
        self.o_proj: GPTQLinear = module.o_proj
        projections = [module.q_proj, module.k_proj, module.v_proj]
        self.qkv = Linear([projection.weight_packed for projection in projections], self.o_proj.activation)
        self.q_norm, self.k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        self.config, self.layer_idx, self.head_dim = module.config, module.layer_idx, module.head_dim
        self.scaling, self.is_causal = module.scaling, module.is_causal
        self.attention_dropout = module.attention_dropout
        # Mistral's modules leave it to their config; where Qwen2's have none, their config's is for other layers.
        window_of = module.config if type(module).__name__ == "MistralAttention" else module
        self.sliding_window = getattr(window_of, "sliding_window", None)
        self._heads = [projection.out_features // self.head_dim for projection in projections]
        self._angles = angles

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """As transformers'; `past_key_values` is `cache` under its older name, which must not be lost."""
        batch, length = hidden_states.shape[:2]
        states = self.qkv(hidden_states.flatten(0, 1)).view(batch * length, -1, self.head_dim)
        query, key, _ = states.split(self._heads, dim=1)  # [batch * T, heads, head_dim]
        for norm, heads in ((self.q_norm, query), (self.k_norm, key)):
            if norm is not None:
                rms_norm(heads, norm.weight, norm.variance_epsilon, out=heads)
        positions, table = self._angles.of(position_embeddings, batch * length)
        rotary_embedding(positions, query, key, table)
        rows = states.view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = rows.split(self._heads, dim=1)  # [batch, heads, T, head_dim]
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=options)
        dropout = self.attention_dropout if self.training else 0.0
        options["sliding_window"] = self.sliding_window
        attended, _ = attention(self, query, key, value, attention_mask, dropout, self.scaling, **options)
        return without_gradient("SelfAttention", self.o_proj(attended.flatten(2)), hidden_states), None
