"""transformers over our operators: the tokens of its own attention, GPTQ checkpoints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import logits_of, random_model, relative_error, save_model
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.quantizers import auto

from teco_kernels import LLM
from teco_kernels.decoder.loader import load_source
from teco_kernels.integrations.transformers import ATTENTION, GPTQLinear, accelerate, enable_gptq
from teco_kernels.integrations.transformers.model import GatedMLP, RMSNorm
from teco_kernels.integrations.transformers.self_attention import Angles, SelfAttention
from teco_kernels.ops import kernel_calls
from teco_kernels.quantization.model import QuantizationSettings, quantize_model

PROMPT = torch.tensor([[17, 250, 33, 101, 7, 64, 3]])
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: Options of `generate`.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    """What `enable_gptq` writes is taken back."""
    mappings = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(content)


def generate(model: Any, prompt: Tensor = PROMPT, tokens: int = 12, **options: Any) -> Tensor:
    options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, **options}
    answer: Tensor = model.generate(prompt, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **options)
    return answer[:, prompt.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_its_own_attention(family: str) -> None:
    config = {"sliding_window": 5} if family == "mistral" else {}
    expected = generate(random_model(family, **config))
    model = random_model(family, **config)
    model.set_attn_implementation(ATTENTION)
    before = kernel_calls("paged_attention")
    assert torch.equal(generate(model), expected)
    assert kernel_calls("paged_attention") - before == 12 * model.config.num_hidden_layers
    assert torch.equal(generate(accelerate(model)), expected)
    assert any(isinstance(module, RMSNorm) for module in model.modules())


@pytest.mark.parametrize("cache", CACHES)
def test_padding_on_the_left(cache: str) -> None:
    """Each row of a padded batch has the tokens that it has alone."""
    model = random_model()
    lengths = [7, 3, 1]
    prompt, seen = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    alone = []
    for row, length in enumerate(lengths):
        alone.append(generate(model, PROMPT[:, :length]))
        prompt[row, -length:], seen[row, -length:] = PROMPT[0, :length], 1
    options = CACHES[cache]
    answer = generate(accelerate(model), prompt, attention_mask=seen, **options)
    assert torch.equal(answer, torch.cat(alone))


def test_several_tokens_behind_a_cache() -> None:
    """Logits of a chunk that follows a cached one: the last query is the last key's."""
    model = random_model()
    with torch.no_grad():
        expected = model(PROMPT).logits
        accelerate(model)
        first = model(PROMPT[:, :3], use_cache=True)
        rest = model(PROMPT[:, 3:], past_key_values=first.past_key_values).logits
    assert relative_error(torch.cat((first.logits, rest), dim=1), expected) < 1e-4


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences(window: int | None) -> None:
    """Rows that hold several sequences, as DataCollatorWithFlattening makes them, give each one's own logits."""
    model = random_model("mistral", sliding_window=window)
    sequences = [PROMPT[:, :3], PROMPT[:, 2:], PROMPT[:, 1:6], PROMPT[:, :5]]
    with torch.no_grad():
        expected = torch.cat([model(ids).logits[0] for ids in sequences])
        accelerate(model)
        starts = torch.tensor([0, 3, 8, 13, 18], dtype=torch.int32)
        positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])
        options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
        packed = torch.cat(sequences, dim=1)
        got = model(packed, position_ids=positions[None], use_cache=False, **options).logits[0]
        assert relative_error(got, expected) < 1e-4
        packed, positions = packed[:, :16].view(2, 8), positions[:16].view(2, 8)
        options |= {"cu_seq_lens_q": starts.clamp(max=16), "cu_seq_lens_k": starts.clamp(max=16)}
        got = model(packed, position_ids=positions, use_cache=False, **options).logits.flatten(0, 1)
        assert relative_error(got, expected[:16]) < 1e-4


@pytest.mark.parametrize("cache", CACHES)
def test_a_window_that_modules_leave_to_the_mask(cache: str) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(sliding_window=4, **sizes)
    model = transformers.PhimoeForCausalLM(config).eval()
    padded, seen = torch.cat((PROMPT[:, :2], PROMPT[:, :5]), dim=1), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    options = CACHES[cache]
    with torch.no_grad():
        expected = model(PROMPT).logits
        texts = generate(model, **options), generate(model, padded, attention_mask=seen, **options)
        accelerate(model)
        assert relative_error(model(PROMPT).logits, expected) < 1e-4
        assert torch.equal(generate(model, **options), texts[0])
        assert torch.equal(generate(model, padded, attention_mask=seen, **options), texts[1])


def test_chunks_are_refused_where_there_is_more_than_one() -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0}
    config = transformers.Llama4TextConfig(attention_chunk_size=5, intermediate_size_mlp=96, **sizes)
    model = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        expected = model(PROMPT[:, :5]).logits
        accelerate(model)
        assert relative_error(model(PROMPT[:, :5]).logits, expected) < 1e-4
        with pytest.raises(ValueError, match="attention_chunk_size: expected at most 5 keys"):
            model(PROMPT)
        with pytest.raises(ValueError, match="attention_chunk_size: expected at most 5 keys"):
            generate(model, PROMPT[:, :4], 3)


def test_blocks_that_see_later_keys_are_refused() -> None:
    """Images within a text: the same flags as for packed sequences."""
    model = accelerate(random_model())
    embeds, blocks = torch.zeros(1, 7, 64), torch.tensor([[-1, 0, 0, 0, -1, -1, -1]])
    with pytest.raises(ValueError, match="causal mask with nothing added"):
        create_causal_mask(model.config, embeds, None, None, block_sequence_ids=blocks)


def test_a_backward_pass_raises() -> None:
    """Not: gradients that leave out what lies before the attention."""
    model = accelerate(random_model()).train()
    with pytest.raises(RuntimeError, match="no gradients"):
        model(PROMPT, labels=PROMPT).loss.backward()
    norm = RMSNorm(torch.nn.Parameter(torch.ones(64)), 1e-6)
    with pytest.raises(RuntimeError, match=r"RMSNorm: .* no gradients"):
        norm(torch.zeros(2, 64)).sum().backward()


def test_what_is_refused() -> None:
    model = accelerate(random_model())
    for seen in ([1, 0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1]):
        with pytest.raises(ValueError, match="attention_mask: expected padding on the left"):
            model(PROMPT, attention_mask=torch.tensor([seen]))
    with pytest.raises(ValueError, match="attention_mask: expected None or a mask of padding"):
        model(PROMPT, attention_mask=torch.zeros(1, 1, 7, 7))
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected a tensor"):  # two sequences in one row
        model(PROMPT, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False)
    starts = torch.tensor([0, 7], dtype=torch.int32)
    seen = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None with padding"):
        model(PROMPT, attention_mask=seen, use_cache=False, cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    with pytest.raises(ValueError, match="activation: expected"):
        enable_gptq(activation="int4")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gptq_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family in 4 bits, made once; Mistral's has a window."""

    @cache
    def make(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        config = {"sliding_window": 5} if family == "mistral" else {}
        plain = save_model(directory / "plain", random_model(family, **config))
        settings = QuantizationSettings(group_size=32, num_sequences=2, sequence_length=64, act_order=family == "qwen2")
        quantize_model(plain, directory / "gptq", settings, calibration=list(range(300)), use_tqdm=False)
        return directory / "gptq"

    return make


def load_gptq(path: Path, activation: Any = "exact") -> Any:
    """The model of transformers over `gptq_matmul`."""
    enable_gptq(activation=activation)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)  # qwen2 has biases, qwen3 norms of heads
@pytest.mark.parametrize("activation", ["exact", "int8"])
def test_a_gptq_directory(family: str, activation: Any, gptq_directory: Callable[[str], Path]) -> None:
    path = gptq_directory(family)
    model = load_gptq(path, activation)
    assert sum(isinstance(module, GPTQLinear) for module in model.modules()) >= 7 * 3
    ours = LLM(path, max_model_len=64, kv_cache_memory=1 << 20, gptq_activation=activation)
    expected = logits_of(ours, PROMPT[0].tolist())
    before = kernel_calls("gptq_matmul")
    with torch.no_grad():
        assert relative_error(model(PROMPT).logits[0], expected) < 2e-2
        assert kernel_calls("gptq_matmul") > before
        accelerate(model)
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(GatedMLP) == kinds.count(SelfAttention) == model.config.num_hidden_layers
        assert relative_error(model(PROMPT).logits[0], expected) < 2e-2
    for kind in (GPTQLinear, GatedMLP):
        layer = next(module for module in model.modules() if isinstance(module, kind))
        size = layer.in_features if isinstance(layer, GPTQLinear) else 64
        with pytest.raises(RuntimeError, match=f"{kind.__name__}: .* no gradients"):
            layer(torch.zeros(1, size, requires_grad=True)).sum().backward()
    attention = next(module for module in model.modules() if isinstance(module, SelfAttention))
    angles = torch.zeros(1, 3, attention.head_dim)
    with pytest.raises(RuntimeError, match=r"SelfAttention: .* no gradients"):
        attention(torch.zeros(1, 3, 64, requires_grad=True), (angles, angles))[0].sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CACHES)
def test_a_gptq_directory_generates(family: str, kind: str, gptq_directory: Callable[[str], Path]) -> None:
    """The tokens of the same layers under transformers' own attention, padded or not."""
    model = load_gptq(gptq_directory(family))
    options = CACHES[kind]
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.int64), PROMPT[:, :5]), dim=1)
    prompts = torch.cat((PROMPT, padded))
    seen = (prompts > 0).long()
    expected = generate(model, prompts, attention_mask=seen, **options), generate(model, **options)
    accelerate(model)
    assert torch.equal(generate(model, prompts, attention_mask=seen, **options), expected[0])
    assert torch.equal(generate(model, **options), expected[1])


def test_packed_sequences_of_a_gptq_directory(gptq_directory: Callable[[str], Path]) -> None:
    """Positions that begin anew within a row."""
    model = load_gptq(gptq_directory("llama"))
    with torch.no_grad():
        expected = torch.cat([model(ids).logits[0] for ids in (PROMPT[:, :3], PROMPT[:, 3:])])
        accelerate(model)
        starts = torch.tensor([0, 3, 7], dtype=torch.int32)
        options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        got = model(PROMPT, position_ids=positions, use_cache=False, **options).logits[0]
        assert relative_error(got, expected) < 1e-4


def test_threads_share_the_angles_of_a_model() -> None:
    """Each has those of its own tensors, whatever the others ask for."""
    angles = Angles()

    def one(seed: int) -> bool:
        cos, sin = torch.randn(2, 1, seed % 3 + 1, 8, generator=torch.Generator().manual_seed(seed)).unbind(0)
        expected = torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=1)
        return all(torch.equal(angles.of((cos, sin), seed % 3 + 1)[1], expected) for _ in range(300))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(one, range(4)))


def test_attention_weights_are_refused(gptq_directory: Callable[[str], Path]) -> None:
    model = accelerate(load_gptq(gptq_directory("llama")))
    with pytest.raises(ValueError, match="output_attentions"):
        model(PROMPT, output_attentions=True)
    model = random_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        accelerate(model)


@pytest.mark.model
def test_the_real_model(default_gguf: Path, model_4bit: Path) -> None:
    source = load_source(default_gguf)
    config = transformers.AutoConfig.for_model(**source.raw_config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({name: source.tensor(name).float() for name in source.names()}, strict=False)
    prompt = torch.tensor([source.tokenizer.encode("The capital of France is Paris, and the capital of Germany is")])
    expected = generate(model, prompt, 32)
    before = kernel_calls("paged_attention")
    assert torch.equal(generate(accelerate(model), prompt, 32), expected)
    assert kernel_calls("paged_attention") - before == 32 * 30
    enable_gptq(activation="exact")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(model_4bit, dtype=torch.float32).eval()
    ours = LLM(model_4bit, gptq_activation="exact")
    (expected_ids,) = ours.generate([prompt[0].tolist()], _greedy(32), use_tqdm=False)
    assert generate(accelerate(quantised), prompt, 32)[0].tolist() == list(expected_ids.outputs[0].token_ids)


def _greedy(tokens: int) -> Any:
    from teco_kernels import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
