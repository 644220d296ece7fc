"""Stages chain: each starts from the best weights of the one before, at its own learning rate, and says what it did."""

import math
import os

import pytest
import pytorch_lightning as pl
import torch
from small_stage import e1, stage
from transformers import AutoConfig, AutoTokenizer

from race import RaceError
from race.attention import SHORT
from race.data import RaceDataModule, collate
from race.data.cache import build_cache
from race.recipes import FILES, read_recipes
from race.score.predictions import score
from race.train.checkpoints import weights_hash
from race.train.stages import Stage, read_log
from race.train.training import decoded_question, start_stage, train_stage
from race_module import RaceModule

OFF = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
FEW = {"epochs": 1, "data": {"limit_questions": 8}}


def at(folder, name: str) -> Stage:
    return Stage(name, folder / "checkpoints", folder / "run")


def test_the_first_stage_starts_from_the_cache(cache):
    pretrained, module = RaceModule(model=cache / "model").model, start_stage(Stage("e1"), cache)
    for name, weights in pretrained.base_model.named_parameters():
        assert torch.equal(weights, module.model.base_model.get_parameter(name)), name
    assert module.lineage["chain"] == [] and len(module.lineage["base_sha256"]) == 64


@pytest.mark.parametrize(("name", "before"), [("e2", ["e1"]), ("e3", ["e1", "e2"])])
def test_every_stage_starts_from_the_best_weights_of_the_one_before(chain, cache, name, before):
    """Only from the weights: neither learning rate nor optimizer state come along; and what it did is remembered."""
    base = at(chain, before[-1]).best()
    module = start_stage(at(chain, name), cache, learning_rate=2e-6)
    saved = torch.load(base.path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    optimizer = module.configure_optimizers()
    assert {group["lr"] for group in optimizer.param_groups} == {2e-6} and not optimizer.state and module.training
    own = at(chain, name).best()
    assert (own.stage, own.chain, own.base, own.base_sha256) == (name, before, base.name, base.sha256)
    assert own.lineage["weights_start"] == weights_hash(RaceModule.load_from_checkpoint(base.path).model)
    assert own.sha256 != base.sha256 and own.lineage["recipe"]["limit_questions"] == 48


def test_names_and_log_on_disk(chain):
    for checkpoint in at(chain, "e1").saved:
        named = f"e1-albert-race-epoch={checkpoint.epoch:02d}-val_loss_epoch={checkpoint.val_loss:.2f}.ckpt"
        assert checkpoint.name == named and checkpoint.learning_rate == 1e-2
    log = read_log(chain / "run", "e1")
    columns = {"train_loss_step", "val_loss_epoch", "val_acc", "train_acc", "tokens_per_second", "epoch", "step"}
    assert columns <= set(log.columns)
    assert log["learning_rate"].dropna().unique().tolist() == pytest.approx([1e-2])
    assert list((chain / "run" / "logs" / "e1").glob("version_0/events.out.tfevents*"))


def test_metrics_are_means_over_questions(chain, cache):
    """Unequal batches: the logged loss and accuracy are those of all questions together."""
    checkpoint = at(chain, "e1").best()
    module, data = checkpoint.load(cache), RaceDataModule(cache, batch_size=16, limit_questions=48)
    dataset = data.dataset("validation")
    batch = collate([dataset[index] for index in range(len(dataset))])
    with torch.no_grad():
        logits = module.eval()(batch)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    accuracy = (logits.argmax(1) == batch.labels).double().mean()
    found = pl.Trainer(accelerator="cpu", **OFF).validate(module, data, verbose=False)[0]
    expected = pytest.approx([float(loss), float(accuracy)], abs=1e-5)
    assert [found[name] for name in ("val_loss_epoch", "val_acc")] == expected
    assert [checkpoint.val_loss, checkpoint.val_acc] == expected


def test_a_trained_model_is_no_start(cache, tmp_path):
    """Training afresh from a model that has been trained would still say that it starts from the base."""
    module = start_stage(e1(tmp_path), cache, learning_rate=1e-2)
    data = RaceDataModule(cache, batch_size=8, limit_questions=8)
    train_stage(e1(tmp_path), module, data, 1)
    with pytest.raises(RaceError, match="run the model's cell again"):
        train_stage(e1(tmp_path / "again"), module, data, 1)
    assert not (tmp_path / "again").exists()


def test_checkpoints_without_their_state_are_refused_by_name(cache, tmp_path):
    """Of a run whose state is lost: a new one would mix with it. Without the files of the message it begins anew.

    Those of later stages are among them, whose base would be another.
    """
    tmp_path /= "my runs"
    stage(tmp_path, cache, **FEW)
    later = tmp_path / "checkpoints" / "resume" / "e3.ckpt"
    later.touch()
    e1(tmp_path).state_path.unlink()
    (name,) = [checkpoint.name for checkpoint in e1(tmp_path).saved]
    with pytest.raises(RaceError, match=f"no state to resume from: {name}.*to another folder: "):
        stage(tmp_path, cache, **FEW)
    assert os.system(f"mv {e1(tmp_path).how_to_train_again.partition('another folder: ')[2]} '{tmp_path}'") == 0
    stage(tmp_path, cache, **FEW)
    assert (
        len(e1(tmp_path).saved) == 1
        and not later.exists()
        and (tmp_path / "run" / "logs" / "e1" / "version_1").exists()
    )


def test_every_epoch_has_an_order_of_its_own(cache):
    """Lightning tells the sampler the epoch: two epochs of a real fit see the same questions in two orders."""
    seen: list[list[int]] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, *_):
            seen.append([])

        def on_train_batch_start(self, trainer, module, batch, *_):
            seen[-1] += [int(sum(batch.lengths[4 * i : 4 * i + 4])) for i in range(len(batch))]

    trainer = pl.Trainer(max_epochs=2, limit_val_batches=0, callbacks=Watch(), **OFF)
    trainer.fit(start_stage(Stage("e1"), cache), RaceDataModule(cache, batch_size=16, limit_questions=48))
    assert len(seen) == 2 and seen[0] != seen[1] and sorted(seen[0]) == sorted(seen[1])


def test_every_step_has_its_own_rate(cache, tmp_path):
    """Warm-up and a straight line to 0; the norm of each gradient is logged."""
    stage(tmp_path, cache, log_every=1, learning_rate=1e-3, schedule="linear", warmup=4, max_grad_norm=1.0)
    log = read_log(tmp_path / "run", "e1")
    expected = [1e-3 * min(step / 4, (16 - step) / 12) for step in range(16)]
    assert log["learning_rate"].dropna().tolist() == pytest.approx(expected, rel=1e-6)
    assert (log["gradient_norm"].dropna() > 0).all() and log["gradient_norm"].notna().sum() == 16


def test_clipping_is_torchs_on_the_whole_batch(cache):
    """In two micro-batches and in one: the gradient of the batch is clipped, not that of a part."""
    steps = []
    for budget in (None, 600):
        pl.seed_everything(0, verbose=False)
        module = start_stage(Stage("e1"), cache, learning_rate=1e-3, token_budget=budget, max_grad_norm=0.01)
        pl.Trainer(max_steps=1, **OFF).fit(module, RaceDataModule(cache, batch_size=8, limit_questions=32))
        steps.append([parameter.grad.clone() for parameter in module.parameters()])
    for whole, parts in zip(*steps, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
    assert torch.stack([part.norm() for part in steps[0]]).norm() == pytest.approx(0.01, rel=1e-4)


def test_sequences_longer_than_the_model_takes_are_refused_before_the_first_step(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("race.train.training.longest_input", lambda model: 20)
    with pytest.raises(RaceError, match="a sequence has [0-9]+ tokens, the model takes 20: set MAX_LEN = 20"):
        stage(tmp_path, cache)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_warm_up_longer_than_the_stage_is_refused(cache, tmp_path):
    with pytest.raises(RaceError, match="WARMUP is 16 steps, the stage has 16"):
        stage(tmp_path, cache, schedule="linear", warmup=16)


@pytest.mark.parametrize("short", [0, 128])
def test_half_precision_trains(cache, tmp_path, monkeypatch, short):
    """bf16 autocast, as on a GPU: both ways of attention take it, and the weights stay float32."""
    monkeypatch.setitem(SHORT, "cpu", short)
    module = stage(tmp_path, cache, **FEW, precision="bf16-mixed", log_every=1).lightning_module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert read_log(tmp_path / "run", "e1")["train_loss_step"].dropna().between(1.2, 1.6).all()


def test_decoded_question_shows_text_options_and_segments(cache):
    data = RaceDataModule(cache)
    table, text = decoded_question(data.dataset("train"), 0), data.train_dataset.text(0)
    assert list(table.index) == ["A", "B", "C", "D"] and list(table["answer"]).index("correct") == text["label"]
    for option, row in zip(text["options"], table.itertuples(), strict=True):
        assert option.lower() in row.sequence.lower()
        assert row.sequence.startswith("[CLS]") and row.sequence.endswith("[SEP]")


def test_missing_bases_are_explained(cache, tmp_path):
    with pytest.raises(RaceError, match="has no e1 checkpoint: run ex01.ipynb first"):
        start_stage(Stage("e2", tmp_path), cache)
    with pytest.raises(RaceError, match="none.ckpt: no such checkpoint"):
        start_stage(Stage("e2"), cache, base_checkpoint=tmp_path / "none.ckpt")


def test_a_cache_without_weights_needs_a_base_model(corpus, cache, tmp_path):
    for part in (AutoTokenizer, AutoConfig):
        part.from_pretrained(cache / "model").save_pretrained(tmp_path / "bare")
    build_cache(str(corpus), str(tmp_path / "bare"), tmp_path / "cache")
    with pytest.raises(RaceError, match="keeps no weights.*BASE_MODEL"):
        start_stage(Stage("e1"), tmp_path / "cache")
    RaceModule(model=cache / "model").model.save_pretrained(tmp_path / "weights")
    for base in (cache / "model", tmp_path / "weights"):  # weights without a tokenizer will do
        assert start_stage(Stage("e1"), tmp_path / "cache", base_model=base).lineage["base"] == str(base)


def test_deterministic_algorithms_on_request(cache, tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(torch.are_deterministic_algorithms_enabled())

    try:
        for name, wanted in (("a", False), ("b", True), ("c", False)):
            stage(tmp_path / name, cache, Look(), **FEW, deterministic=wanted)
        assert seen == [False, True, False] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_code_that_was_edited_after_its_import_is_not_trained(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("race.device.code_hash", lambda: "another")
    with pytest.raises(RaceError, match="edited after this process imported it: restart the kernel"):
        stage(tmp_path, cache, **FEW)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_compile_reaches_the_layers(cache, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("race.train.training.compile_layers", seen.append)
    monkeypatch.setenv("CC", "cc")
    for wanted in (False, True):
        stage(tmp_path / str(wanted), cache, **FEW, compile=wanted)
    assert len(seen) == 1
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RaceError, match="COMPILE = True needs a C compiler"):
        stage(tmp_path / "without", cache, **FEW, compile=True)


def test_values_that_a_parameter_does_not_allow(cache, tmp_path):
    with pytest.raises(RaceError, match="MAX_EPOCHS is 0.*EARLY_STOPPING is 0.*SAVE_MINUTES is -1.0"):
        stage(tmp_path, cache, epochs=0, minutes=-1.0, early_stopping=0)
    for name, value in (("precision", "bf16-true"), ("learning_rate", math.nan)):
        with pytest.raises(RaceError, match=f"{name.upper()} is"):
            stage(tmp_path, cache, **{name: value})
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_demo_learns(tmp_path):
    """Its first stage with its own parameters: most questions are answered, and easy ones are easier."""
    build_cache("demo", "demo", tmp_path / "cache")
    settings, data = read_recipes(FILES["demo"])["chain"].stages["e1"], RaceDataModule(tmp_path / "cache")
    pl.seed_everything(0)
    stage = Stage("e1", tmp_path / "checkpoints", tmp_path / "run")
    module = start_stage(stage, data.cache, learning_rate=settings["LEARNING_RATE"])
    train_stage(stage, module, data, settings["MAX_EPOCHS"])
    accuracy = score(stage.best(), data, "test", tmp_path / "run").results.set_index("level")["accuracy"]
    assert accuracy["all"] >= 0.55 and accuracy["middle"] > accuracy["high"] + 0.3
