"""Checkpoints that another tool wrote give its weights, and that tool reads the same from what is written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import logits_of, random_model, reference_logits, relative_error, save_model
from torch import Tensor

from teco_kernels import LLM
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.quantized_layers import QuantizedLayers
from teco_kernels.quantization.gptq import gptq_quantize
from teco_kernels.quantization.model import QuantizationSettings, quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parent / "data"
MADE_BY_AUTOROUND = sorted(path.name for path in DATA.glob("autoround-*"))
TOKENS = [17, 250, 33, 101, 7, 64]


def load(name: str, **options: str) -> LLM:
    return LLM(DATA / name, max_model_len=64, kv_cache_memory=1 << 20, **options)  # type: ignore[arg-type]


def test_the_checkpoints_are_there() -> None:
    assert len(MADE_BY_AUTOROUND) == 3


@pytest.mark.parametrize("name", MADE_BY_AUTOROUND)
def test_weights_of_autoround(name: str) -> None:
    layers = QuantizedLayers(load_source(DATA / name))
    for layer, expected in load_file(DATA / name / "dequantized.safetensors").items():
        whole = {"inputs": slice(0, expected.shape[0]), "outputs": slice(0, expected.shape[1])}
        weight = layers.read(layer, *expected.shape, bias=False, **whole)
        assert weight is not None
        assert torch.equal(weight.dequantize().half(), expected), layer


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MADE_BY_AUTOROUND)
def test_models_of_autoround_run(name: str) -> None:
    exact, dense = load(name, gptq_activation="exact"), load(name, quantization="dequantize")
    expected = logits_of(dense, TOKENS)
    assert torch.equal(logits_of(exact, TOKENS), expected)
    assert exact.metrics()["weight_bytes"] < dense.metrics()["weight_bytes"]
    assert relative_error(logits_of(load(name), TOKENS), expected) < 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_autoround_reads_what_is_written_here(bits: int, symmetric: bool) -> None:
    """Where it is installed: in an environment of its own, see data/make_autoround.py."""
    reader = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(bits))
    quantised = gptq_quantize(weight, torch.eye(64), bits=bits, group_size=32, symmetric=symmetric)
    layer = reader.QuantLinear(bits, 32, 64, 96, bias=False)
    for name, tensor in quantised.tensors().items():
        setattr(layer, name, tensor)
    # Its own arithmetic on fp16 scales rounds the weights to fp16; the codes, zero points and scales decide.
    del layer.g_idx
    unpacked: Tensor = layer(torch.eye(64, dtype=torch.float16)).detach()
    assert torch.equal(unpacked, quantised.dequantize().t().half())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_runs_what_is_written_here(symmetric: bool, act_order: bool, tmp_path: Path) -> None:
    """Where GPTQModel (7.7.0), optimum and accelerate are installed; GPTQModel's kernels round on the way."""
    pytest.importorskip("gptqmodel")
    settings = QuantizationSettings(
        group_size=32,
        symmetric=symmetric,
        act_order=act_order,
        head_bits=None,
        num_sequences=2,
        sequence_length=64,
    )
    plain = save_model(tmp_path / "plain", random_model())
    quantize_model(plain, tmp_path / "gptq", settings, calibration=list(range(300)), use_tqdm=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gptq", device_map="cpu", dtype=torch.float32
    ).eval()
    ours = LLM(tmp_path / "gptq", max_model_len=64, kv_cache_memory=1 << 20, gptq_activation="exact")
    assert relative_error(logits_of(ours, TOKENS), reference_logits(model, TOKENS)) < 1e-2
