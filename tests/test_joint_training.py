"""A tiny model and its recycle head, trained together from scratch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import logits_of
from typer.testing import CliRunner

from teco_kernels import LLM, SamplingParams
from teco_kernels.cli import app
from teco_kernels.training import JointSettings, train_joint
from teco_kernels.training.joint import JointTrainer
from teco_kernels.training.pretrain import HEAD_FOLDER
from teco_kernels.training.work import claim

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = JointSettings(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    context=32,
    tokens_per_step=256,
    epochs=4,
    learning_rate=1e-2,
    checkpoint_every=0,
)
TEXTS = [
    f"Number {index} of {total}: the {what} of the house is {colour}, and that is all there is to say of it."
    for total in (7, 9)
    for index in range(total)
    for what in ("roof", "door", "wall")
    for colour in ("red", "green", "blue")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    path = tmp_path_factory.mktemp("joint") / "model"
    history, figures = train_joint(TEXTS, path, SETTINGS, use_tqdm=False)
    assert history[-1].validation_loss < history[0].validation_loss - 3
    assert not list(path.parent.glob(".*unfinished"))
    return path, figures


def pieces(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SETTINGS.vocab_size, (count, SETTINGS.context + 1), generator=generator)


def test_the_saved_model_is_the_trained_one(trained: tuple[Path, dict[str, float]]) -> None:
    """By the perplexity of a text that it repeats, which the package computes with its own operators."""
    path, figures = trained
    assert figures["perplexity"] < 4
    assert figures["acceptance"] > 0.5
    assert figures["recycle_perplexity"] < 4
    report = json.loads((path / "training_report.json").read_text())
    assert report["perplexity"] == figures["perplexity"]
    assert report["settings"]["recycle_weight"] == 1.0
    llm = LLM(path, max_model_len=32)
    ids = llm.tokenizer.encode(TEXTS[-1])[:24]
    logprobs = logits_of(llm, ids).log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert float(logprobs[8:].mean().neg().exp()) < 4


def test_the_head_recycles_beside_its_model(trained: tuple[Path, dict[str, float]]) -> None:
    path, _ = trained
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompt = TEXTS[5][:20]
    plain = LLM(path, max_model_len=32).generate([prompt], params, use_tqdm=False)[0].outputs[0]
    llm = LLM(path, max_model_len=32, recycle_head=path / HEAD_FOLDER)
    recycled = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    assert recycled.token_ids == plain.token_ids
    strict = LLM(path, max_model_len=32, recycle_head=path / HEAD_FOLDER, recycle_verify=False)
    strict.generate([prompt], params, use_tqdm=False)
    counts = strict.metrics()
    assert counts["accepted_tokens"] >= counts["guessed_tokens"] / 2 > 0


def test_losses_are_those_of_the_next_token_and_of_the_one_after_it() -> None:
    """Against one text at a time, and a head that sees only what came before."""
    trainer = JointTrainer(pieces(4), pieces(2), SETTINGS)
    trainer.model.eval()
    texts = pieces(3, seed=1)
    together = trainer.losses(texts)
    alone = [trainer.losses(text[None]) for text in texts]
    assert torch.allclose(together.model, torch.stack([losses.model for losses in alone]).mean(), atol=1e-5)
    assert torch.allclose(together.recycle, torch.stack([losses.recycle for losses in alone]).mean(), atol=1e-5)
    assert together.num_places == 3 * (SETTINGS.context - 1)
    # The last token is a target of both, and an input of neither.
    changed = texts.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SETTINGS.vocab_size
    other = trainer.losses(changed)
    assert other.num_right == together.num_right
    assert not torch.equal(other.recycle, together.recycle)


def test_both_losses_shape_the_model() -> None:
    trainer = JointTrainer(pieces(4), pieces(2), SETTINGS)
    assert trainer.head is not None
    for name in ("model", "recycle"):
        trainer.module.zero_grad()
        getattr(trainer.losses(pieces(2)), name).backward()
        gradient = trainer.model.layers[0].mlp.up_proj.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
        of_head = trainer.head.eh_proj.weight.grad
        assert (of_head is not None and bool(of_head.abs().sum() > 0)) == (name == "recycle")


def test_a_model_alone_has_no_head(tmp_path: Path) -> None:
    settings = replace(SETTINGS, recycle_weight=0.0, epochs=0.2)
    _, figures = train_joint(TEXTS, tmp_path / "model", settings, use_tqdm=False)
    assert list(figures) == ["perplexity"]
    assert not (tmp_path / "model" / HEAD_FOLDER).exists()


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = JointTrainer(pieces(40), pieces(4), SETTINGS)
    whole.train(use_tqdm=False)
    for stop_at in (3, None):
        trainer = JointTrainer(pieces(40), pieces(4), SETTINGS)
        trainer.train(tmp_path / "checkpoint", use_tqdm=False, stop_at=stop_at)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, trainer.module.state_dict()[name]), name


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size: expected an even number for each of 4 heads, got 36"):
        JointSettings(hidden_size=36)
    with pytest.raises(ValueError, match=r"num_kv_heads: expected a divisor of num_heads \(4\), got 3"):
        JointSettings(num_kv_heads=3)
    with pytest.raises(ValueError, match="vocab_size: expected 257 to 1048576, got 256"):
        JointSettings(vocab_size=256)
    with pytest.raises(ValueError, match="texts: expected enough for 2048 tokens, got"):
        train_joint(["too short"] * 9, tmp_path / "a", replace(SETTINGS, vocab_size=2048), use_tqdm=False)
    with pytest.raises(ValueError, match="texts: expected more than 1000 tokens to train on"):
        train_joint(TEXTS, tmp_path / "b", replace(SETTINGS, context=1000), use_tqdm=False)
    work = tmp_path / ".c.unfinished"
    claim(work, {"text": "something else"})
    with pytest.raises(ValueError, match=r"\.c\.unfinished: begun with another text; remove it to begin anew"):
        train_joint(TEXTS, tmp_path / "c", SETTINGS, use_tqdm=False)


def test_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS))
    sizes = "--vocab-size 300 --hidden-size 32 --intermediate-size 64 --layers 1 --heads 2 --kv-heads 1 --context 32"
    arguments = ["train-joint", str(tmp_path / "model"), "--text", str(text), *sizes.split()]
    result = CliRunner().invoke(app, [*arguments, "--tokens-per-step", "256", "--characters", "5000"])
    assert result.exit_code == 0, result.output
    assert "acceptance" in result.output
    assert (tmp_path / "model" / HEAD_FOLDER / "model.safetensors").exists()
