"""How a whole model is quantised, and whether that fits its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.ops.packing import BITS
from teco_kernels.quantization.gptq import ActOrder, check_options, check_sizes
from teco_kernels.quantization.sparsity import Sparsity, SparsityLike
from teco_kernels.quantization.torch_layer import linear_shapes


@dataclass(frozen=True)
class QuantizationSettings:
    """How `quantize_model` quantises; the fields of `gptq_quantize`, the head's own, and the size of the calibration.

    Attributes
    ----------
    asymmetric : float
        From 0 to 1: how much of what quantising the layers before has done to a layer's inputs its weights are to make
        up for before they are quantised themselves, see `HessianFactor.correction`. Above 0, the activations of the
        unquantised model are computed too. A layer's reported errors are then those against its corrected weight.
    sparsity : float or str, optional
        Prune in the same pass, but not the head.
    layer_bits : mapping of str to int
        Other bits for the layers whose names a regular expression matches from their beginning on (`re.match`); the
        first that matches counts. Saved as `dynamic` rules.
    head_bits : int or None
        Bits of the language-model head, 8 as a rule; None leaves it as it is. Its grid is symmetric, its order and
        dampening are the defaults. Where head and embedding are one tensor
        and the embedding is kept, a quantised head is written beside it.
    embedding_bits : int or None
        Bits of the embedding, rounded to nearest, which is what GPTQ does on one-hot inputs. None keeps it: a step
        reads one row per token, so bits of it save memory and no time. An extension of the format: other tools find no
        embedding in the result. Where head and embedding are one tensor, this is for both, and `head_bits` is the same
        or None.
    head_group_size : int
        Inputs that share a scale in head and embedding.
    num_sequences, sequence_length : int
        Windows of the calibration text, and their tokens.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: ActOrder = False
    dampening: float = 0.01
    clip_search: bool = False
    refine_sweeps: int = 0
    asymmetric: float = 0.0
    sparsity: SparsityLike | None = None
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    head_bits: int | None = 8
    embedding_bits: int | None = None
    head_group_size: int = 64
    num_sequences: int = 64
    sequence_length: int = 512

    def bits_of(self, name: str) -> int:
        """Bits of the layer `name`."""
        return next((bits for rule, bits in self.layer_bits.items() if re.match(rule, name)), self.bits)

    def shares_head(self, config: ModelConfig) -> bool:
        """Whether one quantised matrix is embedding and head."""
        return self.embedding_bits is not None and config.tie_word_embeddings

    def check(self, config: ModelConfig) -> None:
        """Raise a ValueError that names the setting when a model of these sizes cannot be quantised like this.

        What could fail after hours is found before the first layer is read.
        """
        check_options(act_order=self.act_order, dampening=self.dampening, refine_sweeps=self.refine_sweeps)
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric: expected 0 to 1, got {self.asymmetric}")
        sparsity = None if self.sparsity is None else Sparsity.parse(self.sparsity)
        if sparsity is not None and sparsity.pattern is not None and self.act_order is not False:
            raise ValueError(f"act_order: expected False with a sparsity of {sparsity}, got {self.act_order!r}")
        check_windows(self.num_sequences, self.sequence_length)
        for rule in self.layer_bits:
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(f"layer_bits: expected a regular expression, got {rule!r}: {error}") from None
        shapes = {
            f"model.layers.{index}.{short}": shape
            for index in range(config.num_layers)
            for short, shape in linear_shapes(config).items()
        }
        for rule in self.layer_bits:
            if not any(re.match(rule, name) for name in shapes):
                raise ValueError(
                    f"layer_bits: expected a rule for layers such as {next(iter(shapes))}, {rule!r} matches none "
                    f"(the head's bits are head_bits, the embedding's embedding_bits)"
                )
        for name, shape in shapes.items():
            try:
                check_sizes(*shape, self.bits_of(name), self.group_size)
                if sparsity is not None:
                    sparsity.check(shape[1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for setting, bits, name, keep in (
            ("head_bits", self.head_bits, "lm_head", "leave the head"),
            ("embedding_bits", self.embedding_bits, "model.embed_tokens", "keep the embedding"),
        ):
            if bits is None:
                continue
            if bits not in BITS:
                raise ValueError(f"{setting}: expected one of {BITS}, or None to {keep}, got {bits!r}")
            try:
                check_sizes(config.vocab_size, config.hidden_size, bits, self.head_group_size)
            except ValueError as error:
                prefix = "head_" if "group_size:" in str(error) else ""
                raise ValueError(f"{name}: {prefix}{error}") from None
        if self.shares_head(config) and self.head_bits not in (None, self.embedding_bits):
            raise ValueError(
                f"head_bits: expected {self.embedding_bits} like embedding_bits, or None, since head and embedding of "
                f"this model are one tensor; got {self.head_bits}"
            )


def check_windows(num_sequences: int, sequence_length: int) -> None:
    """Raise a ValueError unless there is something to calibrate on."""
    for name, value in (("num_sequences", num_sequences), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
