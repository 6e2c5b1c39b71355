"""vLLM's linear layers of a GPTQ checkpoint over `gptq_matmul`: quantization="teco_gptq".

Every bit width, group size and order that `GPTQWeight` has, also different ones in the projections that vLLM fuses, and
a quantised head beside a tied embedding, neither of which vLLM's own method takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from teco_kernels.decoder.quantized_layers import QuantizedLayers
from teco_kernels.decoder.weights import Linear
from teco_kernels.integrations.checkpoint import PARTS, HeldTensors
from teco_kernels.ops.gptq import Activation, GPTQWeight

NAME = "teco_gptq"


@register_quantization_config(NAME)
class TecoGPTQConfig(QuantizationConfig):
    """A checkpoint's quantization_config, and the names of its quantised layers.

    Parameters
    ----------
    settings : dict
        The quantization_config. Its key ``activation``, "int8" by default or "exact", is `gptq_matmul`'s.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.activation: Activation = settings.get("activation", "int8")
        if self.activation not in ("int8", "exact"):
            raise ValueError(f"quantization_config: activation: expected 'int8' or 'exact', got {self.activation!r}")
        self.layers: set[str] = set()

    def get_name(self) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TecoGPTQConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Only where the user asked for it."""
        return NAME if user_quant == NAME and hf_quant_cfg.get("quant_method") == "gptq" else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """vLLM's own would drop ``g_idx``."""
        return WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find out which layers are quantised; a head that is has a weight of its own, tied or not."""
        names = get_safetensors_params_metadata(model_name, revision=revision)
        self.layers = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
        if "lm_head" in self.layers and hf_config is not None:
            hf_config.tie_word_embeddings = False

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.layers = set(hf_to_vllm_mapper.apply_list(list(self.layers)))

    def get_quant_method(self, layer: Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(last, ())] or [prefix]
        if any(name in self.layers for name in names):
            return TecoGPTQLinearMethod(self, names)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else UnquantizedEmbeddingMethod()


class TecoGPTQLinearMethod(LinearMethodBase):
    """A layer, or several that vLLM fuses, of one input.

    Parameters
    ----------
    config : TecoGPTQConfig
    names : list of str
        In the checkpoint, in the order of their outputs.
    """

    def __init__(self, config: TecoGPTQConfig, names: list[str]) -> None:
        self._config, self._names = config, names
        self._tensors: dict[str, Tensor] = {}

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters without elements: what is loaded into them is kept aside and packed at the end."""
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError(f"quantization {NAME}: tensor_parallel_size: expected 1, it is not supported")
        self._sizes = input_size, output_partition_sizes
        for part in PARTS:
            parameter = Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._loader(part)  # type: ignore[attr-defined]
            layer.register_parameter(part, parameter)

    def _loader(self, part: str) -> Any:
        def load(parameter: Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            index = 0 if shard is None else {"q": 0, "k": 1, "v": 2}.get(str(shard), shard)
            self._tensors[f"{self._names[int(index)]}.{part}"] = loaded.clone()

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the tensors, and drop them."""
        for part in PARTS:
            if part != "qweight":  # by which vLLM's LoRA finds the layer's device
                delattr(layer, part)
        in_features, sizes = self._sizes
        if isinstance(layer, ParallelLMHead):  # whose sizes vLLM rounds up
            sizes = [layer.org_vocab_size]
        elif len(self._names) == 1:  # fused in the checkpoint already (Phi-3)
            sizes = [sum(sizes)]
        reader = QuantizedLayers(HeldTensors(self._tensors, self._config.settings, "the checkpoint"))
        weights: list[GPTQWeight] = []
        for name, size in zip(self._names, sizes, strict=True):
            whole = {"inputs": slice(0, in_features), "outputs": slice(0, size)}
            weight = reader.read(name, in_features, size, bias=False, **whole)
            if weight is None:
                raise ValueError(f"layer {name!r}: expected tensors of GPTQ, as those that it is fused with have")
            weights.append(weight)
        self._tensors = {}
        layer.teco_linear = Linear(weights, self._config.activation)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = layer.teco_linear(x)
        return out if bias is None else out.add_(bias[: out.shape[-1]])  # a head's has the size that vLLM rounds up to
