"""GPTQ checkpoints made by hand from random codes, against the dequantised model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_decoder_families import PROMPT, load
from tiny_models import VOCAB_SIZE, logits_of, random_model, relative_error, save_model
from torch import Tensor

from teco_kernels import GPTQWeight, SamplingParams, embedding
from teco_kernels.decoder.weights import WeightLoader
from teco_kernels.ops.packing import unpack_rows

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_codes(
    in_features: int, out_features: int, generator: torch.Generator, *, bits: int, group_size: int, act_order: bool
) -> dict[str, Tensor]:
    """The tensors of one layer, of about the size of a layer's weights."""
    group_size = in_features if group_size == -1 else group_size
    num_groups = -(-in_features // group_size)
    word = torch.iinfo(torch.int32)

    def words(*shape: int) -> Tensor:
        return torch.randint(word.min, word.max, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    tensors = {
        "qweight": words(in_features * bits // 32, out_features),
        "qzeros": words(num_groups, out_features * bits // 32),
        "scales": (torch.rand(num_groups, out_features, generator=generator) * 0.8 / 2**bits).half(),
    }
    groups = torch.arange(in_features) // group_size
    if act_order:
        groups = groups[torch.randperm(in_features, generator=generator)]
    return tensors | {"g_idx": groups.to(torch.int32)}


def quantise(
    directory: Path,
    target: Path,
    *,
    settings: dict[str, Any] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    act_order: bool = False,
    head: bool = False,
    embedding: bool = False,
    leave_out: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Replace the projections of `directory` by random codes in `target`; return the plain model they stand for."""
    settings = SETTINGS | (settings or {})
    tensors = load_file(directory / "model.safetensors")
    plain, generator = dict(tensors), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2]:
        layer = name.removesuffix(".weight")
        is_chosen = layer.endswith(PROJECTIONS) or layer in ("lm_head",) * head + ("model.embed_tokens",) * embedding
        if not is_chosen or layer.endswith(leave_out or ("-",)):
            continue
        of_layer = settings | next((v for key, v in (overrides or {}).items() if layer.endswith(key)), {})
        out_features, in_features = tensors.pop(name).shape
        packed = random_codes(
            in_features,
            out_features,
            generator,
            bits=of_layer["bits"],
            group_size=of_layer["group_size"],
            act_order=act_order,
        )
        tensors |= {f"{layer}.{part}": tensor for part, tensor in packed.items()}
        weight = GPTQWeight.from_checkpoint(
            **packed,
            bits=of_layer["bits"],
            zero_point_format="v2" if of_layer.get("checkpoint_format") == "gptq_v2" else "v1",
        )
        plain[name] = weight.dequantize().t().contiguous()
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    save_file(plain, directory / "model.safetensors")
    return plain


VARIANTS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "2 bits": {"settings": {"bits": 2}},
    "3 bits": {"settings": {"bits": 3}},
    "8 bits": {"settings": {"bits": 8}},
    "one group": {"settings": {"group_size": -1}},
    "act-order": {"act_order": True, "settings": {"desc_act": True}},
    "v2": {"settings": {"checkpoint_format": "gptq_v2"}},
    "head": {"head": True, "settings": {"lm_head": True}},
    "embedding": {"embedding": True},
    "embedding and head": {
        "embedding": True,
        "head": True,
        "overrides": {"embed_tokens": {"bits": 8}},
        "settings": {"dynamic": {r"model\.embed_tokens": {"bits": 8}}},
    },
    "dynamic": {
        "overrides": {"down_proj": {"bits": 8}, "k_proj": {"group_size": 64}},
        "settings": {"dynamic": {"+:.*down_proj": {"bits": 8}, ".*k_proj": {"group_size": 64}, "-:.*absent": {}}},
    },
    "some dense": {"leave_out": ("v_proj", "o_proj"), "settings": {"dynamic": {"-:.*[vo]_proj": {}}}},
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_mode_is_the_dequantised_model(variant: str, family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "plain", random_model(family))
    quantise(directory, tmp_path / "gptq", **VARIANTS[variant])
    plain, exact = load(directory), load(tmp_path / "gptq", gptq_activation="exact")
    assert relative_error(logits_of(exact, PROMPT), logits_of(plain, PROMPT)) < 1e-5
    if variant != "act-order":  # which sums in another order
        assert torch.equal(logits_of(exact, PROMPT), logits_of(plain, PROMPT))
    assert exact.metrics()["weight_bytes"] < plain.metrics()["weight_bytes"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_dequantised_mode_is_the_dequantised_model(variant: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "plain", random_model())
    quantise(directory, tmp_path / "gptq", **VARIANTS[variant])
    dense = load(tmp_path / "gptq", quantization="dequantize")
    assert torch.equal(logits_of(dense, PROMPT), logits_of(load(directory), PROMPT))


def test_int8_mode_is_close_and_does_not_depend_on_chunks(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "plain", random_model())
    quantise(directory, tmp_path / "gptq", act_order=True)
    plain, fast = load(directory), load(tmp_path / "gptq")
    whole = logits_of(fast, PROMPT)
    assert 0 < relative_error(whole, logits_of(plain, PROMPT)) < 0.1
    assert torch.equal(logits_of(fast, PROMPT, [1, 13, 7]), whole)


def test_quantised_head_beside_tied_embeddings(tmp_path: Path) -> None:
    """A quantizer that rounds the head of a tied model unties it, whatever the configuration still says."""
    quantise(save_model(tmp_path / "plain", random_model()), tmp_path / "gptq", head=True)
    expected = logits_of(load(tmp_path / "gptq"), PROMPT)
    file = tmp_path / "gptq/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert torch.equal(logits_of(load(tmp_path / "gptq"), PROMPT), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_embedding_is_held_once(bits: int, tmp_path: Path) -> None:
    """One packed weight is gathered from and multiplied by, with the bits of the dequantised model."""
    directory = save_model(tmp_path / "plain", random_model(tie_word_embeddings=True))
    settings = {"dynamic": {r"model\.embed_tokens": {"bits": bits}}}
    overrides = {"embed_tokens": {"bits": bits}}
    quantise(directory, tmp_path / "gptq", embedding=True, settings=settings, overrides=overrides)
    llm, plain = load(tmp_path / "gptq", gptq_activation="exact"), load(directory)
    model = llm.engine.model
    assert isinstance(model.embedding, GPTQWeight)
    assert model.lm_head.weights == [model.embedding]
    assert model.lm_head.weights[0] is model.embedding
    layers = [linear for layer in model.stack.layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    assert model.nbytes == model.embedding.nbytes + sum(linear.nbytes for linear in layers)
    expected = logits_of(plain, PROMPT)
    assert torch.equal(logits_of(llm, PROMPT), expected)
    assert torch.equal(logits_of(llm, PROMPT, [1] * len(PROMPT)), expected)  # which replays a recorded step
    assert torch.equal(logits_of(load(tmp_path / "gptq", quantization="dequantize"), PROMPT), expected)
    params = SamplingParams(temperature=0, max_tokens=12)
    answers = [each.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids for each in (llm, plain)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_packed_embedding_in_half_precision(dtype: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "plain", random_model(tie_word_embeddings=True))
    quantise(directory, tmp_path / "gptq", embedding=True, leave_out=PROJECTIONS)
    llm = load(tmp_path / "gptq", gptq_activation="exact", dtype=dtype)
    ids = torch.tensor(PROMPT)
    weight = llm.engine.model.embedding
    assert isinstance(weight, GPTQWeight)
    rows = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding(ids, weight, dtype=getattr(torch, dtype)), rows[ids].to(getattr(torch, dtype)))
    assert relative_error(logits_of(llm, PROMPT), logits_of(load(directory), PROMPT)) < 0.05


def test_settings_beside_the_configuration(tmp_path: Path) -> None:
    """Older quantizers wrote quantize_config.json and left config.json as it was."""
    directory = save_model(tmp_path / "plain", random_model())
    quantise(directory, tmp_path / "gptq")
    expected = logits_of(load(tmp_path / "gptq"), PROMPT)
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    (tmp_path / "gptq/quantize_config.json").write_text(json.dumps(settings))
    assert torch.equal(logits_of(load(tmp_path / "gptq"), PROMPT), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "fp8"}, "expected quant_method gptq or awq in the quantization_config, got 'fp8'"),
        ({"bits": 5}, "expected 'bits' 2 or 3 or 4 or 8 .* got 5 and 32"),
        ({"bits": None}, "expected 'bits' 2 or 3 or 4 or 8 .* got None and 32"),
        ({"group_size": 0}, "expected 'bits' 2 or 3 or 4 or 8 and a 'group_size' .* got 4 and 0"),
        ({"group_size": 16}, r"tensor 'model.layers.0.self_attn.q_proj.qzeros' has shape \[2, 8\], .* \[4, 8\]"),
        ({"dynamic": {"(": {}}}, "expected an object 'dynamic' of patterns and settings in the quantization_config"),
        ({"dynamic": {".*": 8}}, "expected an object 'dynamic' of patterns and settings in the quantization_config"),
        ({"dynamic": 8}, "expected an object 'dynamic' of patterns and settings in the quantization_config"),
        ({"checkpoint_format": ["gptq"]}, r"expected 'checkpoint_format' gptq or gptq_v2, got \['gptq'\]"),
        ({"checkpoint_format": "marlin"}, "expected 'checkpoint_format' gptq or gptq_v2, got 'marlin'"),
    ],
)
def test_contradictions_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    quantise(save_model(tmp_path / "plain", random_model()), tmp_path / "gptq")
    file = tmp_path / "gptq/config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= settings
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"gptq(/model.safetensors)?: (layer .*: )?{message}"):
        load(tmp_path / "gptq")


AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def slowly_unpacked(words: Tensor) -> Tensor:
    """AWQ's codes by its definition: field f of a word, lowest first, is column AWQ_ORDER[f] of its eight."""
    rows = []
    for row in words.tolist():
        codes = [0] * (8 * len(row))
        for index, word in enumerate(row):
            for field, column in enumerate(AWQ_ORDER):
                codes[8 * index + column] = word % 2**32 >> 4 * field & 15
        rows.append(codes)
    return torch.tensor(rows)


def quantise_awq(directory: Path, target: Path, **settings: Any) -> Path:
    """Replace the projections of `directory` by random AWQ codes in `target`, and by what they stand for in itself."""
    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(2)
    plain = dict(tensors)
    for name in [name for name in tensors if name.removesuffix(".weight").endswith(PROJECTIONS)]:
        layer, (out_features, in_features) = name.removesuffix(".weight"), tensors.pop(name).shape
        groups = in_features // 32

        def words(rows: int, columns: int) -> Tensor:
            return torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator).to(torch.int32)

        parts = {"qweight": words(in_features, out_features), "qzeros": words(groups, out_features)}
        parts["scales"] = (torch.rand(groups, out_features, generator=generator) * 0.05).half()
        tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        codes, zeros = slowly_unpacked(parts["qweight"]), slowly_unpacked(parts["qzeros"])
        values = parts["scales"].float().repeat_interleave(32, 0) * (codes - zeros.repeat_interleave(32, 0))
        plain[name] = values.t().contiguous()
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": AWQ | settings}))
    save_file(plain, directory / "model.safetensors")
    return target


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_awq_is_the_dequantised_model(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "plain", random_model(family))
    target = quantise_awq(directory, tmp_path / "awq", version="GEMM")
    plain = logits_of(load(directory), PROMPT)
    assert torch.equal(logits_of(load(target, gptq_activation="exact"), PROMPT), plain)
    assert torch.equal(logits_of(load(target, quantization="dequantize"), PROMPT), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "gemv"}, "expected AWQ of 4 bits and 'version' gemm .* got 4 bits and 'gemv'"),
        ({"bits": 3}, "expected AWQ of 4 bits and 'version' gemm .* got 3 bits and 'gemm'"),
        ({"group_size": "32"}, "expected a 'group_size' .* got '32'"),
        ({"group_size": 48}, "layer 'model.layers.0.self_attn.q_proj': expected whole groups of 48 inputs"),
        ({"group_size": 64}, r"q_proj.qzeros' has shape \[2, 8\], the configuration asks for \[1, 8\]"),
        ({"quant_method": "gptq"}, r"q_proj.qweight' has shape \[64, 8\], the configuration asks for \[8, 64\]"),
    ],
)
def test_other_awq_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    target = quantise_awq(save_model(tmp_path / "plain", random_model()), tmp_path / "awq", **settings)
    with pytest.raises(ValueError, match=f"awq(/model.safetensors)?: .*{message}"):
        load(target)


@pytest.mark.parametrize(("label", "field"), [("gptq", 0x88888888), ("gptq_v2", 0x77777777)])
def test_zero_points_that_contradict_the_label_are_warned_of(label: str, field: int, tmp_path: Path) -> None:
    """Once; and the label decides."""
    directory = save_model(tmp_path / "plain", random_model())
    quantise(directory, tmp_path / "gptq", settings={"checkpoint_format": label})
    file = tmp_path / "gptq/model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".qzeros")]:
        tensors[name] = torch.full_like(tensors[name], field - 2**32 if field >= 2**31 else field)
    save_file(tensors, file)
    with pytest.warns(UserWarning, match=f"'checkpoint_format' is '{label}', but the zero points look like") as warned:
        llm = load(tmp_path / "gptq", gptq_activation="exact")
    assert len([warning for warning in warned if "checkpoint_format" in str(warning.message)]) == 1
    (weight,) = llm.engine.model.stack.layers[0].down.weights
    assert isinstance(weight, GPTQWeight)
    codes = unpack_rows(tensors["model.layers.0.mlp.down_proj.qweight"], 4)
    zero = {"gptq": 9, "gptq_v2": 7}[label]
    scales = tensors["model.layers.0.mlp.down_proj.scales"].float().repeat_interleave(32, 0)
    assert torch.equal(weight.dequantize(), scales * (codes.float() - zero))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qzeros", lambda tensor: None, "tensor '{}.qzeros' is missing"),
        ("scales", lambda tensor: None, "tensor '{}.scales' is missing"),
        ("qzeros", lambda tensor: tensor.long(), "layer '{}': qzeros: expected dtype int32, got int64"),
        ("qweight", lambda tensor: tensor.float(), "layer '{}': qweight: expected dtype int32, got float32"),
        ("qweight", lambda tensor: tensor[:-1], "tensor '{}.qweight' has shape"),
        ("scales", lambda tensor: tensor * float("nan"), "layer '{}': scales: expected finite values"),
        (
            "scales",
            lambda tensor: tensor.float() + 1e6,
            "layer '{}': scales: expected finite values that fp16 can hold",
        ),
        ("g_idx", lambda tensor: tensor - 1, "layer '{}': g_idx: expected groups 0 to 1, got -1"),
        ("g_idx", lambda tensor: tensor.float(), "layer '{}': g_idx: expected an integer dtype, got float32"),
        ("g_idx", lambda tensor: tensor[:-1], "tensor '{}.g_idx' has shape"),
        ("bias", lambda tensor: tensor.to(torch.int8), "layer '{}': bias: expected a floating dtype"),
    ],
)
@pytest.mark.parametrize(("layer", "size"), [("model.layers.1.mlp.up_proj", 96), ("model.embed_tokens", VOCAB_SIZE)])
def test_damaged_parts_of_a_layer_are_named(
    layer: str, size: int, part: str, change: Any, message: str, tmp_path: Path
) -> None:
    quantise(save_model(tmp_path / "plain", random_model()), tmp_path / "gptq", embedding=True)
    file = tmp_path / "gptq/model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(f"{layer}.{part}", torch.zeros(size)))
    save_file(tensors if changed is None else tensors | {f"{layer}.{part}": changed.contiguous()}, file)
    with pytest.raises((ValueError, TypeError), match=f"gptq(/model.safetensors)?: {message.format(layer)}") as caught:
        load(tmp_path / "gptq")
    assert caught.type is ValueError


def test_an_order_without_its_groups_is_refused(tmp_path: Path) -> None:
    quantise(save_model(tmp_path / "plain", random_model()), tmp_path / "gptq")
    tensors = load_file(tmp_path / "gptq/model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith("g_idx")}, tmp_path / "gptq/model.safetensors")
    load(tmp_path / "gptq")  # inputs in their own order need none
    file = tmp_path / "gptq/config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["desc_act"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a tensor"):
        load(tmp_path / "gptq")


def test_sizes_that_no_checkpoint_packs_are_named() -> None:
    class Source:
        path, raw_config, quantization_config = Path("gptq"), dict[str, Any](), SETTINGS | {"bits": 3}

        def has(self, name: str) -> bool:
            return name.endswith(".qweight")

        def blocks(self, *args: object) -> None:
            return None

        def file_of(self, name: str) -> Path:
            return self.path

    loader = WeightLoader(Source(), torch.float32, "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gptq: layer 'q': expected .* multiples of 32, as 3-bit .* got 40 to 64"):
        loader.linear(["q"], 40, [64], bias=False)


def test_damaged_layer_is_named(tmp_path: Path) -> None:
    quantise(save_model(tmp_path / "plain", random_model()), tmp_path / "gptq")
    file = tmp_path / "gptq/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.g_idx"][5] = 9
    save_file(tensors, file)
    with pytest.raises(
        ValueError,
        match=r"gptq/model.safetensors: layer 'model.layers.1.mlp.up_proj': g_idx: expected groups 0 to 1, got",
    ):
        load(tmp_path / "gptq")
