"""vLLM through our plug-in: `make test-vllm`, in an environment that has it. Skipped elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from teco_kernels.integrations import vllm as plugin

HERE = Path(__file__).parent
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm`")


@cache
def _run(options: str) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_run.py"), options],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr + done.stdout


def run(model: Path, **options: Any) -> dict[str, Any]:
    """What vLLM generates, and how often our kernels ran."""
    code, out, log = _run(json.dumps({"model": str(model), "dtype": "float32", "enforce_eager": True, **options}))
    assert code == 0, log[-3000:]
    answer: dict[str, Any] = json.loads(next(line for line in out.splitlines() if line.startswith('{"tokens"')))
    return answer


@pytest.fixture(scope="module")
def dense(default_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(HERE.parent / "bench" / "engines"))
    from dense_copy import dense_copy

    return dense_copy(default_gguf, tmp_path_factory.mktemp("dense"))


def test_the_entry_point_is_harmless() -> None:
    """It is there, does nothing without vLLM, and may be called twice."""
    (entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "teco_kernels")
    assert entry.load() is plugin.register
    plugin.register()
    plugin.register()


REFUSED = {
    "use_mla": "MLA",
    "use_sparse": "sparse",
    "use_mm_prefix": "partial multimodal token full attention",
    "use_per_head_quant_scales": "per-head quant scales",
    "use_batch_invariant": "batch invariance",
    "use_kv_connector": "KV connector",
    "use_rswa": "R-SWA",
    "use_pcp": "PCP",
    "use_dcp": "DCP",
}


@needs_vllm
@pytest.mark.parametrize("option", REFUSED)
def test_what_the_backend_does_not_do_is_refused(option: str) -> None:
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plugin.register()
    config = AttentionSelectorConfig(head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=16)
    custom = AttentionBackendEnum.CUSTOM
    assert CpuPlatform.get_attn_backend_cls(custom, config).endswith(".TecoAttentionBackend")
    with pytest.raises(ValueError, match=rf"\(teco_kernels\): {REFUSED[option]} not supported"):
        CpuPlatform.get_attn_backend_cls(custom, config._replace(**{option: True}))


@needs_vllm
def test_layers_of_other_shapes() -> None:
    """Phi-3's, which the checkpoint has fused: the same as one layer for each. A head of any size."""
    import torch
    from vllm.lora.layers.utils import _get_lora_device
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from teco_kernels.integrations.vllm.gptq import TecoGPTQConfig, TecoGPTQLinearMethod

    inputs, sizes = 64, [32, 16, 16]
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).int()

    whole = {
        "qweight": integers(inputs // 8, sum(sizes)),
        "qzeros": integers(2, sum(sizes) // 8),
        "scales": torch.rand(2, sum(sizes), generator=generator).half(),
        "g_idx": torch.arange(inputs).int() // 32,
    }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}

    def layer(names: list[str]) -> torch.nn.Module:
        layer = torch.nn.Module()
        method = TecoGPTQLinearMethod(TecoGPTQConfig(settings), names)
        method.create_weights(layer, inputs, sizes, inputs, sum(sizes), torch.float32)
        for part, tensor in whole.items():
            parameter = getattr(layer, part)
            if len(names) == 1:
                parameter.weight_loader(parameter, tensor)
                continue
            per_row = tensor.shape[-1] * torch.tensor(sizes) // sum(sizes)
            pieces = [tensor] * 3 if part == "g_idx" else tensor.split(per_row.tolist(), dim=1)
            for shard, piece in zip("qkv", pieces, strict=True):
                parameter.weight_loader(parameter, piece, shard)
        method.process_weights_after_loading(layer)
        return layer

    x = torch.randn(3, inputs, generator=generator)
    apart, fused = layer(["q_proj", "k_proj", "v_proj"]), layer(["qkv_proj"])
    assert torch.equal(fused.teco_linear(x), apart.teco_linear(x))  # type: ignore[operator]
    assert _get_lora_device(fused) == torch.device("cpu")

    # A vocabulary of 56, which vLLM rounds up to 64.
    head = ParallelLMHead.__new__(ParallelLMHead)
    torch.nn.Module.__init__(head)
    head.org_vocab_size = 56
    method = TecoGPTQLinearMethod(TecoGPTQConfig(settings), ["lm_head"])
    method.create_weights(head, inputs, [64], inputs, 64, torch.float32)
    for part, tensor in whole.items():
        cut = tensor if part == "g_idx" else tensor[:, : tensor.shape[1] * 56 // 64].contiguous()
        getattr(head, part).weight_loader(getattr(head, part), cut)
    method.process_weights_after_loading(head)
    assert method.apply(head, x).shape == (3, 56)


@needs_vllm
def test_the_backend_of_another_plugin_stays() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    register_backend(custom, "other.Backend")
    try:
        plugin.register()
        assert custom.get_path() == "other.Backend"
        assert not plugin.is_our_attention(custom)
    finally:
        custom.clear_override()
        plugin.register()


@needs_vllm
@pytest.mark.model
def test_nothing_changes_until_it_is_chosen(dense: Path) -> None:
    answer = run(dense)
    assert set(answer["calls"].values()) == {0}
    assert answer["layers"] == []


@needs_vllm
@pytest.mark.model
def test_the_tokens_of_its_own_attention(dense: Path) -> None:
    answer = run(dense, attention_config={"backend": "CUSTOM"})
    assert answer["tokens"] == run(dense)["tokens"]
    assert answer["calls"]["paged_attention"] > 0
    assert answer["calls"]["paged_attention"] == answer["calls"]["reshape_and_cache"]
    assert answer["calls"]["gptq_matmul"] == 0
    assert answer["layers"] == ["rms_norm", "rotary_embedding", "silu_and_mul"]


@needs_vllm
@pytest.mark.model
def test_layers_can_be_switched_off(dense: Path) -> None:
    """By vLLM's own names of them."""
    switched = {"custom_ops": ["all", "-rotary_embedding", "-silu_and_mul"]}
    answer = run(dense, attention_config={"backend": "CUSTOM"}, compilation_config=switched)
    assert answer["layers"] == ["rms_norm"]


@needs_vllm
@pytest.mark.model
def test_a_compiled_graph_gives_the_same(dense: Path) -> None:
    answer = run(dense, attention_config={"backend": "CUSTOM"}, enforce_eager=False)
    assert answer["tokens"] == run(dense)["tokens"]
    assert answer["calls"]["paged_attention"] > 0


@needs_vllm
@pytest.mark.model
def test_a_compiled_graph_with_our_layers(dense: Path) -> None:
    switched = {"custom_ops": ["all"]}
    options = {"attention_config": {"backend": "CUSTOM"}, "compilation_config": switched, "dtype": "bfloat16"}
    compiled, eager = run(dense, **options, enforce_eager=False), run(dense, **options)
    assert compiled["layers"] == eager["layers"] == ["rms_norm", "rotary_embedding", "silu_and_mul"]
    assert compiled["tokens"] == eager["tokens"]


@needs_vllm
@pytest.mark.model
@pytest.mark.parametrize("eager", [True, False])
def test_a_gptq_checkpoint(model_4bit: Path, eager: bool) -> None:
    """Of mixed bits, asymmetric, with a quantised head: our own engine's tokens on exact activations."""
    from vllm_run import PROMPTS

    from teco_kernels import LLM, SamplingParams

    exact = {"quantization_config": {**json.loads((model_4bit / "config.json").read_text())["quantization_config"]}}
    exact["quantization_config"]["activation"] = "exact"
    answer = run(
        model_4bit,
        quantization="teco_gptq",
        attention_config={"backend": "CUSTOM"},
        hf_overrides=exact,
        enforce_eager=eager,
    )
    assert answer["calls"]["gptq_matmul"] > 0
    ours = LLM(model_4bit, gptq_activation="exact")
    outputs = ours.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    assert answer["tokens"] == [list(output.outputs[0].token_ids) for output in outputs]


@needs_vllm
@pytest.mark.model
def test_without_the_plugin_it_is_refused(model_4bit: Path) -> None:
    """vLLM's own method takes no asymmetric checkpoint."""
    code, _, log = _run(json.dumps({"model": str(model_4bit), "dtype": "bfloat16"}))
    assert code != 0
    assert "Unsupported quantization config: bits=4, sym=False" in log
