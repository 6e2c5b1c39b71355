"""Makes the checkpoints beside it with another quantizer, AutoRound 0.16.1 (Apache-2.0), in an environment of its own.

    pip install auto-round==0.16.1 tokenizers gguf    # beside torch 2.13, transformers 5.24
    PYTHONPATH=tests:python python tests/data/make_autoround.py

The model is a random Llama of one layer; it is no one's work but this script's. Beside each checkpoint lies
``dequantized.safetensors``, its weights ``[in_features, out_features]`` as AutoRound's own inference code unpacks them,
in fp16, which it computes in. With AutoRound in the environment, tests/test_interop.py also tests the other direction.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from safetensors.torch import load_file, save_file
from tiny_models import END, random_model, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
BITS, GROUP_SIZE = 4, 32
#: Folder: AutoRound's name of the format, symmetric or not.
CHECKPOINTS = {
    "autoround-gptq-symmetric": ("auto_gptq", True),
    "autoround-gptq-asymmetric": ("auto_gptq", False),
    "autoround-awq": ("auto_awq", False),
}


def make(folder: Path, layout: str, symmetric: bool) -> None:
    """Quantise, and keep the files that a model is loaded from."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token=END, pad_token=END)
    generator = torch.Generator().manual_seed(0)
    windows = [{"input_ids": torch.randint(0, 317, (64,), generator=generator)} for _ in range(8)]
    quantizer = AutoRound(
        random_model(num_hidden_layers=1),
        tokenizer,
        bits=BITS,
        group_size=GROUP_SIZE,
        sym=symmetric,
        iters=0,
        seqlen=64,
        nsamples=8,
        dataset=DataLoader(windows, batch_size=4),
        device_map="cpu",
        disable_opt_rtn=True,
    )
    made = folder.with_suffix(".made")
    quantizer.quantize_and_save(str(made), format=layout)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (written,) = made.rglob("model.safetensors")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(written.with_name(name), folder / name)
    shutil.rmtree(made)
    tensors = load_file(folder / "model.safetensors")
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    unpack = awq if layout == "auto_awq" else gptq
    weights = {layer: unpack({part: tensors.get(f"{layer}.{part}") for part in PARTS}) for layer in layers}
    save_file(weights, folder / "dequantized.safetensors")


PARTS = ("qweight", "qzeros", "scales", "g_idx")


def gptq(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Through its layer: what it makes of the unit vectors. (With a g_idx the layer takes square weights only.)"""
    in_features, out_features = len(parts["g_idx"]), parts["scales"].shape[1]
    assert torch.equal(parts["g_idx"], (torch.arange(in_features) // GROUP_SIZE).int())
    layer = QuantLinear(BITS, GROUP_SIZE, in_features, out_features, bias=False)
    for name in ("qweight", "qzeros", "scales"):
        setattr(layer, name, parts[name])
    layer.post_init()
    return layer(torch.eye(in_features, dtype=torch.float16)).detach().half().contiguous()


def awq(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Through its function of that name."""
    return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], BITS, GROUP_SIZE).half().contiguous()


if __name__ == "__main__":
    for name, (layout, symmetric) in CHECKPOINTS.items():
        make(HERE / name, layout, symmetric)
