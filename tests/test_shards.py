"""What each rank of a model has: its parts of weights and biases, which together are the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_gptq_directory import VARIANTS, quantise, quantise_awq
from tiny_models import random_model, save_gguf, save_model
from torch import Tensor

from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.model import Transformer
from teco_kernels.decoder.parts import select_groups
from teco_kernels.decoder.shard import Shard, split
from teco_kernels.decoder.weights import Linear

pytestmark = pytest.mark.usefixtures("one_thread")

# Nothing but the vocabulary can be shared out evenly among two, and that not among three.
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
}


def config_of(**changes: Any) -> Any:
    path = Path("model")
    raw = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    }
    from teco_kernels.decoder.config import ModelConfig

    return ModelConfig.from_dict(raw | changes, str(path))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_are_the_whole(world_size: int) -> None:
    for config in (config_of(), config_of(vocab_size=100, intermediate_size=100), config_of(vocab_size=5)):
        shards = [Shard.of(config, rank, world_size) for rank in range(world_size)]
        for name, size in (
            ("kv_heads", config.num_kv_heads),
            ("heads", config.num_heads),
            ("intermediate", config.intermediate_size),
            ("vocabulary", config.vocab_size),
        ):
            parts = [getattr(shard, name) for shard in shards]
            assert [i for part in parts for i in part] == list(range(size))
            assert all(parts), (name, parts)
        assert all(shard.vocabulary.start == rank * shard.vocabulary_stride for rank, shard in enumerate(shards))


def test_shares_are_even_but_for_the_rest() -> None:
    assert split(3, 2) == [range(2), range(2, 3)]
    assert split(1536, 3, 32) == [range(512), range(512, 1024), range(1024, 1536)]
    assert [len(part) for part in split(160, 2, 32)] == [96, 64]
    assert [len(part) for part in split(8, 5)] == [2, 2, 1, 2, 1]
    with pytest.raises(ValueError, match=r"tensor_parallel_size: expected 1 to 3, the model's KV heads, got 4"):
        Shard.of(config_of(), 0, 4)


@pytest.mark.parametrize(
    ("groups", "rows", "g_idx"),
    [
        ([0] * 64 + [1] * 64, [0, 1], None),
        ([1] * 32 + [2] * 64, [1, 2, 2], None),  # a border cuts the first: the other is taken in two
        ([0] * 16 + [1] * 64, [0, 1], [0] * 16 + [1] * 64),  # less than a block
        ([3, 1] * 32, [1, 3], [1, 0] * 32),
    ],
)
def test_groups_of_a_part(groups: list[int], rows: list[int], g_idx: list[int] | None) -> None:
    found, order = select_groups(torch.tensor(groups))
    assert found.tolist() == rows
    assert (None if order is None else order.tolist()) == g_idx
    per_input = found[torch.arange(len(groups)) // (len(groups) // len(rows))] if order is None else found[order]
    assert per_input.tolist() == groups


# ---- parts of weights are those of the whole, to the bit


def values(linear: Linear) -> Tensor:
    """``[in_features, out_features]``"""
    return torch.cat([weight.dequantize() for weight in linear.weights], dim=1)


def biases(linear: Linear) -> Tensor:
    parts = [torch.zeros(w.out_features) if w.bias is None else w.bias for w in linear.weights]
    return torch.cat(parts)


def check_parts(path: Path, **options: Any) -> None:
    source = load_source(path)
    config = source.config
    options = {"dtype": torch.float32, "max_model_len": 64, "activation": "exact", **options}
    whole = Transformer(source, **options)
    for world_size in (2, 3):
        shards = [Shard.of(config, rank, world_size) for rank in range(world_size)]
        parts = [Transformer(source, shard=shard, **options) for shard in shards]
        assert torch.equal(torch.cat([values(part.lm_head) for part in parts], 1), values(whole.lm_head))
        embeddings = [part.embedding for part in parts]
        rows = [e if isinstance(e, Tensor) else e.dequantize().t() for e in (*embeddings, whole.embedding)]
        assert torch.equal(torch.cat(rows[:-1]), rows[-1])
        for index, layer in enumerate(whole.stack.layers):
            layers = [part.stack.layers[index] for part in parts]
            heads = [[len(shard.heads), len(shard.kv_heads), len(shard.kv_heads)] for shard in shards]
            sizes = [[n * config.head_dim for n in counts] for counts in heads]
            for of, cut in ((values, 1), (biases, 0)):
                qkv = [of(part.qkv).split(size, dim=cut) for part, size in zip(layers, sizes, strict=True)]
                joined = torch.cat([part[i] for i in range(3) for part in qkv], cut)
                assert torch.equal(joined, of(layer.qkv))
                gate_up = [of(part.gate_up).chunk(2, dim=cut) for part in layers]
                joined = torch.cat([part[i] for i in range(2) for part in gate_up], cut)
                assert torch.equal(joined, of(layer.gate_up))
            for name in ("output", "down"):
                assert torch.equal(torch.cat([values(getattr(p, name)) for p in layers]), values(getattr(layer, name)))
                assert torch.equal(sum(biases(getattr(part, name)) for part in layers), biases(getattr(layer, name)))


# Of o_proj, 192 inputs are cut at multiples of 64; of down_proj, 160 at multiples of 32.
CUT_GROUPS = {
    "overrides": {"o_proj": {"group_size": 96}, "down_proj": {"group_size": 80}},
    "settings": {"dynamic": {".*o_proj": {"group_size": 96}, ".*down_proj": {"group_size": 80}}},
}
QUANTISED = {
    **VARIANTS,
    "cut groups": CUT_GROUPS,
    **{
        f"act-order, {bits} bits": {"act_order": True, "settings": {"desc_act": True, "bits": bits}}
        for bits in (2, 3, 8)
    },
    "cut groups in act-order": {
        "act_order": True,
        "overrides": CUT_GROUPS["overrides"],
        "settings": {"desc_act": True, **CUT_GROUPS["settings"]},
    },
}


@pytest.mark.parametrize("variant", QUANTISED)
def test_parts_of_gptq_weights(variant: str, tmp_path: Path) -> None:
    quantise(save_model(tmp_path / "plain", random_model(**SIZES)), tmp_path / "gptq", **QUANTISED[variant])
    check_parts(tmp_path / "gptq")
    check_parts(tmp_path / "gptq", quantization="dequantize")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_parts_of_dense_and_awq_weights_and_biases(family: str, tmp_path: Path) -> None:
    sizes = SIZES | ({"attention_bias": True, "mlp_bias": True} if family == "llama" else {})
    check_parts(directory := save_model(tmp_path / "plain", random_model(family, **sizes)))
    check_parts(quantise_awq(directory, tmp_path / "awq"))


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_parts_of_gguf_files(quantization: str, tmp_path: Path) -> None:
    check_parts(save_gguf(tmp_path / "model.gguf", random_model(**SIZES), quantization))
    check_parts(save_gguf(tmp_path / "tied.gguf", random_model(**SIZES, tie_word_embeddings=True), quantization))


def test_only_a_ranks_own_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_source(save_model(tmp_path, random_model(**SIZES)))
    read = 0

    def counted(method: Any) -> Any:
        def call(*args: Any) -> Tensor:
            nonlocal read
            tensor: Tensor = method(*args)
            read += tensor.nbytes
            return tensor

        return call

    monkeypatch.setattr(source, "_read", counted(source._read))
    monkeypatch.setattr(source, "_read_part", counted(source._read_part))
    amounts = []
    for world_size in (1, 3):
        read = 0
        shard = Shard.of(source.config, 0, world_size)
        Transformer(source, dtype=torch.float32, max_model_len=64, activation="exact", shard=shard)
        amounts.append(read)
    assert amounts[1] < 0.42 * amounts[0]
