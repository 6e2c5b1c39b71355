"""From text to a small model with its recycle head: a vocabulary, a joint training, a folder of both."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from teco_kernels import __version__
from teco_kernels.assets import exclusive
from teco_kernels.decoder.json_file import write_json
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.recycle_head import WEIGHTS_NAME
from teco_kernels.decoder.tokenizer import Tokenizer
from teco_kernels.training.head import Base
from teco_kernels.training.joint import JointSettings, JointTrainer
from teco_kernels.training.loop import Progress
from teco_kernels.training.save import REPORT_NAME, quantise_head, save_recycle_head
from teco_kernels.training.work import claim, for_json

#: The head's folder in that of its model.
HEAD_FOLDER = "recycle_head"

_END = "<|endoftext|>"
_VALIDATION_STRIDE = 8  # every so many-th text is for validation


def train_joint(
    texts: Sequence[str], out: str | Path, settings: JointSettings | None = None, *, use_tqdm: bool = True
) -> tuple[list[Progress], dict[str, float]]:
    """Train a small model and its recycle head from scratch, together, and save them in a folder.

    Interrupted, the same call goes on where it was: the last checkpoint lies in a hidden folder beside `out` until that
    is complete. The folder is a Hugging Face one (``LlamaForCausalLM``, fp32) with the head in ``recycle_head``:
    ``LLM(out, recycle_head=out / "recycle_head")``.

    Parameters
    ----------
    texts : sequence of str
        Every eighth is for validation, the others are trained on.
    out : str or Path
        The folder to make.
    settings : JointSettings, optional

    Returns
    -------
    list of Progress
        The course of the training; `loss` is the sum of both losses.
    dict of str to float
        On the texts for validation, before the head is rounded to fp16: ``perplexity``, and with a head
        ``recycle_perplexity`` (of the token after the next) and ``acceptance`` (how often the head says what the model
        will).

    Raises
    ------
    ValueError
        When `out` exists, the texts are too short for these settings, or what an earlier run has left belongs to other
        texts or settings.
    """
    out, settings = Path(out), settings or JointSettings()
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if out.exists():
            raise ValueError(f"{out}: exists already")
        work = out.with_name(f".{out.name}.unfinished")
        parts = (
            [text for index, text in enumerate(texts) if (index + 1) % _VALIDATION_STRIDE],
            texts[_VALIDATION_STRIDE - 1 :: _VALIDATION_STRIDE],
        )
        tokenizer = _learn_vocabulary(parts[0], settings.vocab_size)
        training, validation = (_pieces(tokenizer, part, settings.context) for part in parts)
        if not len(training) or not len(validation):
            raise ValueError(
                f"texts: expected more than {settings.context} tokens to train on, and in every eighth text as many to "
                f"validate with; got {len(texts)} texts"
            )
        claim(work, {"text": _digest(texts)})  # nothing was begun before
        trainer = JointTrainer(training, validation, settings)
        trainer.train(work / "checkpoint.safetensors", use_tqdm=use_tqdm)
        figures = trainer.evaluate(validation)
        report = {
            "teco_kernels": __version__,
            "settings": asdict(settings),
            "training_tokens": len(training) * settings.context,
            "validation_tokens": len(validation) * settings.context,
            **figures,
            "history": for_json(trainer.history),
        }
        made = work / out.name
        shutil.rmtree(made, ignore_errors=True)
        _save(made, trainer, tokenizer, report)
        os.rename(made, out)
        shutil.rmtree(work)
    return trainer.history, figures


def beginning(texts: Sequence[str], characters: int) -> Sequence[str]:
    """The first texts, until they have so many characters."""
    taken = 0
    for count, text in enumerate(texts):
        if taken >= characters:
            return texts[:count]
        taken += len(text)
    return texts


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _learn_vocabulary(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE; the last token ends a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([_END])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"texts: expected enough for {vocab_size} tokens, got {tokenizer.get_vocab_size()}")
    return tokenizer


def _pieces(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], context: int) -> Tensor:
    """int64 ``[N, context + 1]``: the texts one after the other, cut; each piece begins with the last token before."""
    end = tokenizer.token_to_id(_END)
    ids = [token for encoding in tokenizer.encode_batch(list(texts)) for token in (*encoding.ids, end)]
    return torch.tensor(ids).unfold(0, context + 1, context).contiguous() if len(ids) > context else torch.empty(0, 0)


def _save(path: Path, trainer: JointTrainer, tokenizer: tokenizers.Tokenizer, report: dict[str, Any]) -> None:
    config = trainer.model.config
    path.mkdir()
    Tokenizer(tokenizer, special_tokens={"eos_token": _END}).save(path)
    end = tokenizer.token_to_id(_END)
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "dtype": "float32",
    }
    write_json(path / "config.json", raw)
    tensors = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.copymode(path / "config.json", path / WEIGHTS_NAME)  # safetensors makes files for their owner only
    write_json(path / REPORT_NAME, report)
    if trainer.head is None:
        return
    base = Base(load_source(path))
    head, tensors, quantization = quantise_head(trainer.head, base, [], bits=None)
    vocabulary = torch.arange(config.vocab_size)
    save_recycle_head(
        path / HEAD_FOLDER, head.config, tensors, vocabulary, base, report=report, quantization=quantization
    )
