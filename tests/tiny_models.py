"""Checkpoints of random tiny models, for the decoder's tests: Hugging Face directories and GGUF files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from teco_kernels import LLM
from teco_kernels.decoder.batch import Span
from teco_kernels.decoder.tokenizer import Tokenizer

VOCAB_SIZE = 320
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TEXT = [
    "The capital of France is Paris, and the capital of Germany is Berlin.",
    "A kernel reads the weights once, and the cache grows by one token at every step.",
    "It's 2024 or 1,234.56 - isn't it? Straße, naïve café, 東京, emoji 🙂; they're all bytes.",
]
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@cache
def tiny_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens, the last three of them special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 3, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([END, USER, ASSISTANT])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def save_tokenizer(path: Path) -> None:
    """Write the files of `tiny_tokenizer`, with a chat template."""
    Tokenizer(tiny_tokenizer(), chat_template=CHAT_TEMPLATE, special_tokens={"eos_token": END}).save(path)


def random_model(family: str = "llama", *, seed: int = 0, **config: Any) -> Any:
    """A transformers model in fp32 whose norms and biases are random too, so that none can be left out unseen."""
    torch.manual_seed(seed)
    model_class = {
        "llama": transformers.LlamaForCausalLM,
        "mistral": transformers.MistralForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
    }[family]
    end = tiny_tokenizer().token_to_id(END)
    sizes = _SIZES | {"eos_token_id": end, "bos_token_id": None, "tie_word_embeddings": False}
    model = model_class(model_class.config_class(**(sizes | config))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data = 0.5 * torch.randn_like(parameter)
    return model


def save_model(path: Path, model: Any, **options: Any) -> Path:
    """Write a model and its tokenizer as a Hugging Face directory."""
    model.save_pretrained(path, **options)
    (path / "generation_config.json").unlink(missing_ok=True)
    save_tokenizer(path)
    return path


def reference_logits(model: Any, token_ids: list[int]) -> Tensor:
    """transformers' logits ``[T, vocab_size]``, eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float()


def is_greedy(model: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether `answer` is transformers' greedy continuation: each token its likeliest after those before it."""
    likeliest = reference_logits(model, prompt + answer)[len(prompt) - 1 : -1].argmax(-1)
    return answer == likeliest.tolist()


def logits_of(llm: LLM, token_ids: list[int], chunks: list[int] | None = None) -> Tensor:
    """Our logits ``[T, vocab_size]``, the tokens computed in chunks of these sizes."""
    cache = llm.engine.cache
    blocks = cache.pool.allocate(-(-len(token_ids) // cache.block_size))
    assert blocks is not None
    logits, start = [], 0
    with torch.inference_mode():
        for size in chunks or [len(token_ids)]:
            span = Span(token_ids, start, size, blocks, all_logits=True)
            logits.append(llm.engine.runner.run([span]).clone())
            start += size
    cache.pool.free(blocks)
    return torch.cat(logits).float()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection in the order of llama.cpp's llama files: the halves of a head interleaved."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def save_gguf(
    path: Path,
    model: Any,
    quantization: str = "F32",
    *,
    rope_factors: Tensor | None = None,
    exceptions: dict[str, str] | None = None,
    **metadata: Any,
) -> Path:
    """Write a model as a GGUF file, and round its own matrices to what the file holds.

    `exceptions` are other quantizations for the matrices whose name contains a key.
    `metadata` are further keys under the architecture, e.g. ``{"rope.scaling.type": "linear"}``.
    """
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    _add_tokenizer(writer)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    for name, parameter in model.named_parameters():
        exception = next((kind for part, kind in (exceptions or {}).items() if part in name), quantization)
        kind = gguf.GGMLQuantizationType[exception]
        values = parameter.detach().numpy()
        stored_kind = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(values, stored_kind)
        parameter.data = torch.from_numpy(np.array(gguf.quants.dequantize(stored, stored_kind), dtype=np.float32))
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            num_heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            stored = _permute(stored, num_heads)
        module, suffix = name.rsplit(".", 1)
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            gguf_name = f"blk.{layer}.{_GGUF_NAMES[part]}.{suffix}"
        else:
            gguf_name = f"{_GGUF_NAMES[module]}.{suffix}"
        writer.add_tensor(gguf_name, stored, raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    special = {tokenizer.token_to_id(token) for token in (END, USER, ASSISTANT)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokenizer.id_to_token(index) for index in range(VOCAB_SIZE)])
    writer.add_token_types([3 if index in special else 1 for index in range(VOCAB_SIZE)])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.token_to_id(END))
    writer.add_chat_template(CHAT_TEMPLATE)
