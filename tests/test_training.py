"""Distilling a recycle head from a tiny random model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, logits_of, random_model, save_model
from torch.nn import functional as F
from typer.testing import CliRunner

from teco_kernels import LLM, SamplingParams, assets
from teco_kernels.cli import app
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.recycle_head import RecycleHeadTensors
from teco_kernels.training import TrainingSettings, acceptance, load_head, train_recycle
from teco_kernels.training.head import Base, RecycleHead
from teco_kernels.training.prompts import prompts
from teco_kernels.training.recording import Recording, record, record_part
from teco_kernels.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "articles")

SETTINGS = TrainingSettings(
    intermediate_size=32, draft_vocab_size=200, epochs=3, tokens_per_step=256, checkpoint_every=0, validate_every=0.25
)
SIZES = {"num_tokens": 2000, "num_validation_tokens": 300, "max_new_tokens": 16, "use_tqdm": False}


@pytest.fixture(scope="module")
def articles() -> object:
    """Made-up articles in place of those that would have to be fetched."""
    with pytest.MonkeyPatch.context() as patch:
        text = "\n\n".join(f"Paragraph {number}: " + "a sentence of some length. " * 15 for number in range(4))
        patch.setattr("teco_kernels.training.prompts.calibration_articles", lambda: [text] * 16)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), random_model(initializer_range=0.1))


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(path, max_num_seqs=16, max_model_len=96)


@pytest.fixture(scope="module")
def recorded(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Recording], list[Recording]]:
    folder = tmp_path_factory.mktemp("recording")
    training = record_part(llm, folder, "training", num_tokens=3000, max_new_tokens=16, use_tqdm=False)
    validation = record_part(llm, folder, "validation", num_tokens=300, max_new_tokens=16, use_tqdm=False)
    return [Recording.load(file) for file in training], [Recording.load(file) for file in validation]


@pytest.fixture(scope="module")
def base(path: Path) -> Base:
    return Base(load_source(path))


def test_recorded_states_give_the_logits_of_a_pass_over_the_text(llm: LLM, base: Base) -> None:
    """Prompts that share a beginning, are longer than a step, or wait for a place in the batch."""
    shared = list(range(40))
    prompt_ids = [shared, [*shared, 7], [5, 6]] * 12
    params = [SamplingParams(temperature=index % 2, seed=index, max_tokens=8, ignore_eos=True) for index in range(36)]
    recording = record(llm, prompt_ids, params)
    assert recording.lengths.tolist() == [len(ids) + 7 for ids in prompt_ids]
    assert recording.num_prompt.tolist() == [len(ids) for ids in prompt_ids]
    for ids, greedy, hidden, num_prompt in recording.sequences():
        logits = logits_of(llm, ids.tolist())
        assert greedy.tolist() == logits.argmax(-1).tolist()
        assert torch.allclose(hidden.float() @ base.rows.t(), logits, atol=2e-2)
        assert len(ids) == num_prompt + 7
    assert llm.engine.runner.observer is None
    assert llm.engine.scheduler.enable_prefix_caching


def test_guesses_are_not_recorded(path: Path) -> None:
    with pytest.raises(ValueError, match="llm: expected a model without recycle_head"):
        record(LLM(path, recycle_head="lookup", max_model_len=64), [[1]], [SamplingParams()])


def test_preempted_sequences_are_recorded_once(path: Path, llm: LLM) -> None:
    block_bytes = 3 * 16 * 2 * 2 * 16 * 4
    cramped = LLM(path, max_num_seqs=8, max_model_len=96, kv_cache_memory=12 * block_bytes)
    prompt_ids = [[index, index + 1, index + 2] for index in range(8)]
    params = [SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)] * 8
    got, expected = (record(model, prompt_ids, params) for model in (cramped, llm))
    assert cramped.metrics()["preemptions"] > 0
    for name, tensor in vars(expected).items():
        assert torch.equal(tensor, getattr(got, name)), name


def test_recording_goes_on_where_it_was(llm: LLM, tmp_path: Path) -> None:
    options = {"max_new_tokens": 4, "use_tqdm": False}
    first = record_part(llm, tmp_path / "a", "training", num_tokens=1, **options)
    stamp = first[0].stat().st_mtime_ns
    more = record_part(llm, tmp_path / "a", "training", num_tokens=12000, **options)
    assert more[: len(first)] == first
    assert len(more) > 1
    assert first[0].stat().st_mtime_ns == stamp
    at_once = record_part(llm, tmp_path / "b", "training", num_tokens=12000, **options)
    for one, other in zip(more, at_once, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_parts_share_no_function_and_no_article(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [f"Article {number} " + "goes on and on. " * 30 for number in range(16)]
    monkeypatch.setattr("teco_kernels.training.prompts.calibration_articles", lambda: articles)
    drawn = {part: prompts(llm.tokenizer, 600, part) for part in ("training", "validation")}
    assert prompts(llm.tokenizer, 100, "training") == drawn["training"][:100]
    texts = {part: "".join(map(llm.tokenizer.decode, ids)) for part, ids in drawn.items()}
    for pattern in (r"def (\w+)\(", r"Article (\d+) "):
        training, validation = (set(re.findall(pattern, texts[part])) for part in ("training", "validation"))
        assert training
        assert validation
        assert not training & validation


def test_loss_falls_and_the_head_learns(base: Base, recorded: tuple[list[Recording], list[Recording]]) -> None:
    trainer = Trainer(base, *recorded, replace(SETTINGS, epochs=8, dropout=0.0))
    trainer.train(use_tqdm=False)
    losses = [entry.loss for entry in trainer.history[1:]]
    assert losses[-1] < losses[0] - 0.03
    assert trainer.history[-1].acceptance > trainer.history[1].acceptance
    assert trainer.step == trainer.num_steps


def test_a_killed_training_goes_on_bit_for_bit(
    base: Base, recorded: tuple[list[Recording], list[Recording]], tmp_path: Path
) -> None:
    whole = Trainer(base, *recorded, SETTINGS)
    whole.train(use_tqdm=False)
    checkpoint = tmp_path / "checkpoint"
    for stop_at in (5, 17, None):
        trainer = Trainer(base, *recorded, SETTINGS)
        trainer.train(checkpoint, use_tqdm=False, stop_at=stop_at)
    for name, tensor in whole.head.state_dict().items():
        assert torch.equal(tensor, trainer.head.state_dict()[name]), name
    assert [entry[3:] for entry in trainer.history][1:] == [entry[3:] for entry in whole.history][1:]


def test_checkpoints_of_other_trainings_are_refused(
    base: Base, recorded: tuple[list[Recording], list[Recording]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    Trainer(base, *recorded, SETTINGS).train(checkpoint, use_tqdm=False, stop_at=1)
    with pytest.raises(ValueError, match=r"checkpoint: this training was begun with num_tokens \d+, not \d+"):
        Trainer(base, recorded[1], recorded[1], SETTINGS).load(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint: this training was begun with dropout 0\.1, not 0\.2"):
        Trainer(base, *recorded, replace(SETTINGS, dropout=0.2)).load(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint: expected a checkpoint"):
        Trainer(base, *recorded, SETTINGS).load(checkpoint)


@pytest.mark.parametrize(
    ("settings", "bits"), [({}, 8), ({}, 4), ({"hidden_size": 32, "num_layers": 2, "draft_vocab_size": 0}, None)]
)
def test_a_saved_head_loads_and_says_the_same(
    path: Path, base: Base, tmp_path: Path, settings: dict[str, int], bits: int | None
) -> None:
    out, recording = tmp_path / "head", tmp_path / "recording"
    history, result = train_recycle(
        path,
        out,
        replace(SETTINGS, **settings),
        recording=recording,
        bits=bits,
        said_vocab_size=0 if bits is None else 100,
        **SIZES,
    )
    assert sorted(file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")) == ["head", "recording"]
    head, vocabulary = load_head(out, base.config)
    tensors = RecycleHeadTensors(out, base.config)
    config = tensors.config
    assert (vocabulary is None) == (config.draft_vocab_size is None) == (bits is None)
    assert vocabulary is None or len(vocabulary) == 100
    assert tensors.has("mtp.eh_proj.weight" if bits is None else "mtp.eh_proj.qweight")
    assert head.eh_proj.weight.shape == (config.hidden_size, 128)
    validation = [Recording.load(file) for file in sorted(recording.glob("validation*"))]
    again = acceptance(head, vocabulary, base, validation)
    assert again.head == result.head
    assert again.lookup == result.lookup
    report = json.loads((out / "training_report.json").read_text())
    assert len(report["history"]) == len(history)
    with pytest.raises(ValueError, match=r"head: exists already"):
        train_recycle(path, out, SETTINGS, **SIZES)
    with pytest.raises(ValueError, match=r"recording: begun with max_new_tokens 16, not 17"):
        train_recycle(path, tmp_path / "other", SETTINGS, recording=recording, **{**SIZES, "max_new_tokens": 17})


def test_heads_of_other_models_and_damaged_ones_are_refused(path: Path, base: Base, tmp_path: Path) -> None:
    out = tmp_path / "head"
    train_recycle(path, out, replace(SETTINGS, epochs=0.1), **SIZES)
    for change, expected in (
        ({"hidden_size": 128}, "this recycle head is for models of hidden size 64, the model has 128"),
        ({"vocab_size": 1000}, f"this recycle head is for models of vocabulary {VOCAB_SIZE}, the model has 1000"),
    ):
        with pytest.raises(ValueError, match=expected):
            load_head(out, replace(base.config, **change))
    file, config = out / "model.safetensors", out / "config.json"
    tensors = load_file(file)

    def refuses(expected: str) -> None:
        with pytest.raises(ValueError, match=expected):
            load_head(out, base.config)

    save_file({name: tensor for name, tensor in tensors.items() if name != "mtp.norm.weight"}, file)
    refuses(r"model\.safetensors: tensor 'mtp\.norm\.weight' is missing")
    save_file({**tensors, "mtp.other": torch.zeros(1)}, file)
    refuses(r"tensor 'mtp\.other' is unknown")
    save_file({**tensors, "mtp.norm.weight": torch.zeros(3)}, file)
    refuses(r"tensor 'mtp\.norm\.weight' has shape \[3\], the configuration asks for \[64\]")
    save_file({**tensors, "draft_vocabulary": tensors["draft_vocabulary"].flip(0)}, file)
    refuses(r"'draft_vocabulary': expected int64 token ids, ascending, below 320")
    file.write_bytes(b"short")
    refuses(r"model\.safetensors: truncated or damaged safetensors file")
    file.unlink()
    refuses(r"model\.safetensors: file is missing")
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "num_heads": "two"}))
    refuses(r"config\.json: expected a positive number 'num_heads', got 'two'")
    config.write_text(json.dumps({**raw, "model_type": "llama"}))
    refuses(r"config\.json: expected 'model_type' 'teco_recycle', got 'llama'")


def test_sequences_of_a_batch_do_not_see_each_other(base: Base) -> None:
    torch.manual_seed(0)
    head = RecycleHead(SETTINGS.head_config(base.config)).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    embedded, hidden = torch.randn(2, 12, 64)
    with torch.no_grad():
        together = head(embedded, hidden, [7, 5])
        alone = torch.cat([head(embedded[:7], hidden[:7], [7]), head(embedded[7:], hidden[7:], [5])])
        changed = head(F.pad(embedded[:6], (0, 0, 0, 1)), hidden[:7], [7])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(changed[:6], together[:6], atol=1e-5)  # and no place sees the ones after it


def test_settings_are_checked(base: Base) -> None:
    with pytest.raises(ValueError, match=r"epochs: expected 0\.001 to 1000000\.0, got 0"):
        TrainingSettings(epochs=0)
    with pytest.raises(ValueError, match=r"hidden_size: expected a multiple of the base's head_dim, 16; got 40"):
        TrainingSettings(hidden_size=40).head_config(base.config)


def test_command(path: Path, tmp_path: Path) -> None:
    options = ["--tokens=2000", "--validation-tokens=300", "--max-new-tokens=16", "--epochs=1", "--tokens-per-step=256"]
    arguments = ["train-recycle", str(path), str(tmp_path / "head"), *options, f"--png={tmp_path / 'course.png'}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "lookup, else head" in result.output
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "head" / "config.json").exists()
    result = CliRunner().invoke(app, ["train-recycle", str(path), str(tmp_path / "head")])
    assert result.exit_code == 1
    assert "exists already" in result.output


def test_calibration_articles_are_those_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "wikipedia_articles", lambda: [str(number) for number in range(10)])
    assert "\n\n".join(assets.calibration_articles()) == assets.calibration_text()
    assert set(assets.calibration_articles()).isdisjoint(assets.held_out_text().split("\n\n"))
