"""One transformer layer in plain torch operations: the forward pass of calibration, open between its linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from teco_kernels.decoder.config import ModelConfig

#: Reads a linear layer of the model by name: weight ``[out, in]`` and bias ``[out]`` or None, fp32.
LinearReader = Callable[[str], tuple[Tensor, Tensor | None]]
#: Reads any other tensor of the model by name, as fp32.
TensorReader = Callable[[str], Tensor]

#: Linear layers of one layer in the order of computation; those of one stage have the same input.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of the linear layers in `STAGES`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    sizes = [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]
    return dict(zip((name for stage in STAGES for name in stage), sizes, strict=True))


@dataclass
class Activations:
    """Some sequences on their way through a layer.

    Attributes
    ----------
    hidden : Tensor
        The residual stream, fp32 ``[sequences, length, hidden_size]``.
    branch : Tensor or None
        Input of the attention's output projection, or of the MLP's down projection.
    """

    hidden: Tensor
    branch: Tensor | None = None


class TorchLayer:
    """A layer whose weights may be replaced one stage after another, each stage seeing what the earlier ones became.

    Parameters
    ----------
    config : ModelConfig
    index : int
    read_linear : LinearReader
    read_tensor : TensorReader
    cos_sin : Tensor
        As `ops.rope.cos_sin_cache` makes it, for the length of the sequences.

    Attributes
    ----------
    prefix : str
        Of its tensors' names.
    weights : dict of str to Tensor
        fp32 ``[out, in]`` by the names in `STAGES`. May be assigned to.
    biases : dict of str to Tensor or None
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        read_linear: LinearReader,
        read_tensor: TensorReader,
        cos_sin: Tensor,
    ) -> None:
        self.config = config
        self.prefix = f"model.layers.{index}."
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}
        for name in (name for stage in STAGES for name in stage):
            self.weights[name], self.biases[name] = read_linear(self.prefix + name)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
        self._norms = {name: read_tensor(f"{self.prefix}{name}.weight") for name in norms}
        self._cos, self._sin = cos_sin.chunk(2, dim=-1)
        self._mask = _attention_mask(len(cos_sin), config.sliding_windows[index])

    def copy(self) -> TorchLayer:
        """The same layer, to keep while weights of this one are replaced."""
        other = copy.copy(self)
        other.weights = dict(self.weights)
        return other

    def stage_input(self, stage: int, activations: Activations) -> Tensor:
        """Input of the stage's linear layers, ``[sequences, length, in_features]``."""
        if stage == 0:
            return self._norm(activations.hidden, "input_layernorm")
        if stage == 2:
            return self._norm(activations.hidden, "post_attention_layernorm")
        assert activations.branch is not None
        return activations.branch

    def advance(self, stage: int, activations: Activations) -> Activations:
        """Compute the stage, up to where the next one begins."""
        x = self.stage_input(stage, activations)
        if stage == 0:
            return Activations(activations.hidden, self._attend(x))
        if stage == 2:
            gated = F.silu(self._linear("mlp.gate_proj", x)).mul_(self._linear("mlp.up_proj", x))
            return Activations(activations.hidden, gated)
        return Activations(activations.hidden + self._linear(STAGES[stage][0], x))

    def __call__(self, hidden: Tensor) -> Tensor:
        """The whole layer."""
        activations = Activations(hidden)
        for stage in range(len(STAGES)):
            activations = self.advance(stage, activations)
        return activations.hidden

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name], self.biases[name])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self._norms[name], self.config.rms_norm_eps)

    def _attend(self, x: Tensor) -> Tensor:
        def heads(name: str) -> Tensor:  # [sequences, heads, length, head_dim]
            return self._linear(f"self_attn.{name}_proj", x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        query, key, value = heads("q"), heads("k"), heads("v")
        if self.config.qk_norm:
            query, key = self._norm(query, "self_attn.q_norm"), self._norm(key, "self_attn.k_norm")
        attended = F.scaled_dot_product_attention(
            self._rotate(query),
            self._rotate(key),
            value,
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=self.config.num_heads != self.config.num_kv_heads,
        )
        return attended.transpose(1, 2).flatten(2)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self._cos - second * self._sin, second * self._cos + first * self._sin), dim=-1)


def _attention_mask(length: int, window: int | None) -> Tensor | None:
    """True where a query may look, ``[length, length]``; None for plain causal attention."""
    if window is None or window >= length:
        return None
    position = torch.arange(length)
    distance = position.unsqueeze(1) - position
    return (distance >= 0) & (distance < window)
