"""GPTQ checkpoints in transformers: from_pretrained makes layers over `gptq_matmul`, without gptqmodel or optimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import GPTQConfig

from teco_kernels.decoder.quantized_layers import QuantizedLayers
from teco_kernels.integrations.checkpoint import PARTS, SafetensorsFiles
from teco_kernels.integrations.gradients import without_gradient
from teco_kernels.ops import GPTQWeight, gptq_matmul
from teco_kernels.ops.gptq import Activation


class GPTQLinear(torch.nn.Module):
    """In place of a `torch.nn.Linear` whose weight is quantised.

    Attributes
    ----------
    weight_packed : GPTQWeight or None
        None until the checkpoint has been read.
    activation : {"int8", "exact"}
        As in `gptq_matmul`.
    """

    def __init__(self, in_features: int, out_features: int, has_bias: bool, activation: Activation) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, has_bias
        self.activation: Activation = activation
        self.weight_packed: GPTQWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight_packed is not None
        return without_gradient("GPTQLinear", gptq_matmul(x, self.weight_packed, activation=self.activation), x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


class TecoGPTQConfig(GPTQConfig):
    """transformers' configuration, with what it would leave out of the checkpoint's (``dynamic`` rules)."""

    def __init__(self, **settings: Any) -> None:
        self.settings = dict(settings)
        settings.pop("modules_in_block_to_quantize", None)  # the checkpoint's tensors say it; this asks for optimum
        super().__init__(**settings)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": "gptq", **self.settings}


class TecoGPTQQuantizer(HfQuantizer):
    """Replaces the layers that the checkpoint has in quantised form, and reads them after everything else."""

    activation: Activation = "int8"
    quantization_config: Any

    def validate_environment(self, *args: Any, **options: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("quantization_config: expected a checkpoint of GPTQ; `teco-kernels quantize` makes one")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> None:
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(f"expected a checkpoint of safetensors files, got {checkpoint_files}")
        self._source = SafetensorsFiles(checkpoint_files, self.quantization_config.settings)
        names = {name.removesuffix(".qweight") for name in self._source.names() if name.endswith(".qweight")}
        for name, module in list(model.named_modules()):
            if name in names and isinstance(module, torch.nn.Linear):
                has_bias = module.bias is not None
                layer = GPTQLinear(module.in_features, module.out_features, has_bias, self.activation)
                model.set_submodule(name, layer)
                names.remove(name)
                model.all_tied_weights_keys.pop(f"{name}.weight", None)  # a head of its own beside the embedding
        if names:
            raise ValueError(f"{self._source.path}: expected linear layers of the model, got {sorted(names)[0]!r}")
        # They are read below, not by transformers.
        parts = "|".join((*PARTS, "bias"))
        layers = "|".join(name.replace(".", r"\.") for name, layer in _layers(model))
        model._keys_to_ignore_on_load_unexpected.add(rf"^({layers})\.({parts})$")

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        reader = QuantizedLayers(self._source)
        for name, layer in _layers(model):
            inputs, outputs = layer.in_features, layer.out_features
            whole = {"inputs": slice(0, inputs), "outputs": slice(0, outputs)}
            layer.weight_packed = reader.read(name, inputs, outputs, bias=layer.has_bias, **whole)
        del self._source
        return model

    def is_serializable(self, *args: Any, **options: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _layers(model: torch.nn.Module) -> list[tuple[str, GPTQLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, GPTQLinear)]


def enable_gptq(*, activation: Activation = "int8") -> None:
    """Let from_pretrained load GPTQ checkpoints with layers over `gptq_matmul`, in this process and from now on.

    transformers' own quantizer of the name "gptq", which needs gptqmodel and optimum, is replaced; its registry refuses
    a second one of the name, so this writes into it.

    Parameters
    ----------
    activation : {"int8", "exact"}
        As in `gptq_matmul`.
    """
    if activation not in ("int8", "exact"):
        raise ValueError(f"activation: expected 'int8' or 'exact', got {activation!r}")
    quantizer = type("TecoGPTQQuantizer", (TecoGPTQQuantizer,), {"activation": activation})
    auto.AUTO_QUANTIZER_MAPPING["gptq"] = quantizer  # type: ignore[assignment]
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = TecoGPTQConfig
