"""Stages chain: each starts from the best weights of the one before, at its own learning rate, and says what it did."""

import dataclasses
import os
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from small_stage import stage as train_e1

from race import RaceError
from race.data import RaceDataModule
from race.data.batches import part_ends
from race.device import default_precision
from race.report.sentences import other_rule
from race.score.predict import predict
from race.train.callbacks import StageReport, StartInForce
from race.train.checkpoints import weights_hash
from race.train.logs import read_log
from race.train.stages import Stage, best_checkpoints, by_the_other_rule, latest_checkpoint
from race.train.state import changed_settings, stage_identity
from race.train.training import decoded_question, start_stage, train_stage
from race_module import RaceModule


def at(folder, name: str) -> Stage:
    return Stage(name, folder / "checkpoints", folder / "run")


def train(name: str, cache, folder, learning_rate: float, epochs: int = 1, **settings) -> RaceModule:
    pl.seed_everything(0)
    stage = at(folder, name)
    module = start_stage(stage, cache, learning_rate=learning_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = RaceDataModule(cache, batch_size=16, limit_questions=48)
        train_stage(stage, module, data, epochs, log_every=1, **settings)
    return module


@pytest.fixture(scope="module")
def chain(cache, tmp_path_factory):
    """e1, e2 and e3 trained for a few steps."""
    folder = tmp_path_factory.mktemp("chain")
    for stage, rate, epochs in (("e1", 1e-2, 2), ("e2", 1e-2, 1), ("e3", 1e-3, 1)):
        train(stage, cache, folder, rate, epochs)
    return folder


def test_every_stage_starts_from_the_best_weights_of_the_one_before(chain, cache):
    assert torch.equal(
        start_stage(Stage("e1"), cache).model.albert.embeddings.word_embeddings.weight,
        RaceModule(model=cache / "model").model.albert.embeddings.word_embeddings.weight,
    )
    for stage, before in (("e2", "e1"), ("e3", "e2")):
        base = at(chain, before).best()
        saved = torch.load(base.path, weights_only=True)["state_dict"]
        module = start_stage(at(chain, stage), cache)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        lineage = at(chain, stage).best().lineage
        assert lineage["base"] == base.name
        assert lineage["weights_start"] == weights_hash(RaceModule.load_from_checkpoint(base.path).model)
    hashes = {
        weights_hash(RaceModule.load_from_checkpoint(path).model) for path in (chain / "checkpoints").glob("*.ckpt")
    }
    assert len(hashes) == 4, "every checkpoint holds other weights"


def test_only_weights_are_taken(chain, cache):
    """A base trained with another learning rate does not bring it along; its optimizer state stays behind."""
    module = start_stage(at(chain, "e2"), cache, learning_rate=2e-6)
    optimizer = module.configure_optimizers()
    assert {group["lr"] for group in optimizer.param_groups} == {2e-6} and not optimizer.state
    assert module.training


def test_lineage_names_the_chain(chain):
    lineage = at(chain, "e3").best().lineage
    assert (lineage["stage"], lineage["chain"]) == ("e3", ["e1", "e2"])
    assert lineage["recipe"]["learning_rate"] == 1e-3


def test_checkpoint_names_and_the_best(chain):
    table = at(chain, "e1").checkpoints()
    assert len(table) == 2 and table["val_loss_epoch"].is_monotonic_increasing
    for row in table.itertuples():
        assert row.path.name == f"e1-albert-race-epoch={row.epoch:02d}-val_loss_epoch={row.val_loss_epoch:.2f}.ckpt"
    assert at(chain, "e1").best().path == table["path"][0]


def test_best_is_decided_by_the_exact_loss(tmp_path):
    """File names round to two digits; the checkpoint itself remembers the loss exactly."""
    for epoch, loss in ((0, 0.7849), (1, 0.7751), (2, 0.7751)):
        record = {"stage": "e1", "epoch": epoch, "metrics": {"val_loss_epoch": loss, "val_acc": 0.5}}
        torch.save({"race": record}, tmp_path / f"e1-albert-race-epoch={epoch:02d}-val_loss_epoch=0.78.ckpt")
    assert "epoch=01" in Stage("e1", tmp_path).best().name


def test_a_name_is_only_a_name(chain, tmp_path):
    """Renamed by a website or a browser, a checkpoint is what it was; of another's the stage is not guessed."""
    before = at(chain, "e1").checkpoints()
    names = ["e1-albert-race-epoch_00-val_loss_epoch_0.1.ckpt", "Kopie (1).ckpt"]
    for name, path in zip(names, before["path"], strict=True):
        (tmp_path / name).write_bytes(path.read_bytes())
    torch.save({"state_dict": {}}, tmp_path / "e1-albert-race-epoch=00-val_loss_epoch=0.01.ckpt")
    after = Stage("e1", tmp_path).checkpoints()
    assert [path.name for path in after["path"]] == names
    assert after.drop(columns="path").equals(before.drop(columns="path"))
    assert latest_checkpoint(tmp_path).path.name == names[0] and len(best_checkpoints(tmp_path)) == 1
    for name in names:
        (tmp_path / name).unlink()
    for ask in (Stage("e1", tmp_path).best, lambda: latest_checkpoint(tmp_path)):
        with pytest.raises(RaceError, match=r"which stage made e1-albert.*0.01.ckpt is unknown: give its path"):
            ask()


def test_a_damaged_checkpoint_is_named_and_no_silent_second_best(chain, tmp_path, capsys):
    """One that may have been the best stops whoever asks for the best; a worse one is named and skipped."""
    good = at(chain, "e1").best()
    (tmp_path / good.name).write_bytes(good.path.read_bytes())
    worse, better = (tmp_path / f"e1-albert-race-epoch=09-val_loss_epoch={loss}.ckpt" for loss in ("9.99", "0.01"))
    worse.write_bytes(good.path.read_bytes()[:5000])
    assert Stage("e1", tmp_path).best().name == good.name
    assert len(Stage("e1", tmp_path).checkpoints()) == 1
    assert f"skipped: {worse}: cut off or damaged" in capsys.readouterr().out
    better.write_bytes(good.path.read_bytes()[:5000])
    with pytest.raises(RaceError, match="val_loss_epoch=0.01.ckpt: cut off or damaged.*remove it"):
        Stage("e1", tmp_path).best()


def test_a_stage_that_diverged_says_so(tmp_path):
    record = {"stage": "e1", "epoch": 0, "metrics": {"val_loss_epoch": float("nan")}}
    torch.save({"race": record}, tmp_path / "e1-albert-race-epoch=00-val_loss_epoch=nan.ckpt")
    with pytest.raises(RaceError, match="e1 diverged"):
        Stage("e1", tmp_path).best()


def test_a_trained_model_is_no_start(cache, tmp_path):
    """Training afresh from a model that has been trained would still say that it starts from the base."""
    module = train("e1", cache, tmp_path, 1e-2)
    finished = at(tmp_path, "e1").best().path
    data = RaceDataModule(cache, batch_size=16, limit_questions=48)
    with pytest.raises(RaceError, match="run the model's cell again"):
        train_stage(at(tmp_path, "e1"), module, data, 1, fresh=True)
    assert at(tmp_path, "e1").best().path == finished, "the finished run stays where it was"


def test_every_epoch_has_an_order_of_its_own(cache):
    """Lightning tells the sampler the epoch: two epochs of a real fit see the same questions in two orders."""
    seen: list[list[int]] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, *_):
            seen.append([])

        def on_train_batch_start(self, trainer, module, batch, *_):
            seen[-1] += [int(sum(batch.lengths[4 * i : 4 * i + 4])) for i in range(len(batch))]

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, limit_val_batches=0, callbacks=Watch(), **options)
    trainer.fit(start_stage(Stage("e1"), cache), RaceDataModule(cache, batch_size=16, limit_questions=48))
    assert len(seen) == 2 and seen[0] != seen[1] and sorted(seen[0]) == sorted(seen[1])


def test_curves_can_be_drawn_before_the_first_validation(chain):
    from race.report.training_figures import training_curves

    log = read_log(chain / "run", "e1")
    early = log[log["train_loss_step"].notna()].dropna(axis=1, how="all")
    figure = training_curves(early, "e1")
    assert "not validated yet" in figure.axes[0].get_title(loc="left")


def test_log_on_disk(chain):
    log = read_log(chain / "run", "e1")
    columns = {"train_loss_step", "val_loss_epoch", "val_acc", "train_acc", "tokens_per_second", "epoch", "step"}
    assert columns <= set(log.columns)
    assert log["learning_rate"].dropna().unique().tolist() == pytest.approx([1e-2])
    assert log["train_loss_step"].notna().sum() == 6
    assert list((chain / "run" / "logs" / "e1").glob("version_0/events.out.tfevents*"))


def test_validation_metrics_are_means_over_questions(chain, cache):
    """Unequal batches: the logged loss and accuracy are those of all questions together."""
    path = at(chain, "e1").best()
    metrics = path.metrics
    predictions = predict(path, cache, "validation", batch_size=16, limit_questions=48, device="cpu")
    right = (predictions["answer"] == predictions["prediction"]).mean()
    probability = [row[f"p_{row['answer']}"] for _, row in predictions.iterrows()]
    assert metrics["val_acc"] == pytest.approx(right, abs=1e-6)
    assert metrics["val_loss_epoch"] == pytest.approx(-pd.Series(probability).map(torch.math.log).mean(), abs=1e-5)


def test_trainer_test_reports_loss_and_accuracy(chain, cache):
    path = at(chain, "e3").best()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    module = RaceModule.load_from_checkpoint(path.path)
    (metrics,) = trainer.test(module, RaceDataModule(cache), verbose=False)
    predictions = predict(path, cache, "test", device="cpu")
    assert metrics["test_acc"] == pytest.approx((predictions["answer"] == predictions["prediction"]).mean(), abs=1e-6)
    assert 0 < metrics["test_loss"] < 10


def test_a_wrong_learning_rate_in_force_stops_the_stage(cache, tmp_path):
    module = start_stage(Stage("e1"), cache, learning_rate=1e-3)
    make = module.configure_optimizers

    def wrong():
        optimizer = make()
        optimizer.param_groups[0]["lr"] = 2e-5
        return optimizer

    module.configure_optimizers = wrong
    trainer = pl.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=StartInForce(),
    )
    with pytest.raises(RaceError, match="learning rate in force"):
        trainer.fit(module, RaceDataModule(cache, limit_questions=8))


def test_every_step_has_its_own_rate_and_another_stops_it(cache, tmp_path):
    """Warm-up and a straight line to 0; a callback of the user's that sets another rate is found at once."""
    train_e1(tmp_path, cache, log_every=1, learning_rate=1e-3, schedule="linear", warmup=4, max_grad_norm=1.0)
    log = read_log(tmp_path / "run", "e1")
    expected = [1e-3 * min(step / 4, (16 - step) / 12) for step in range(16)]
    assert log["learning_rate"].dropna().tolist() == pytest.approx(expected, rel=1e-6)
    assert (log["gradient_norm"].dropna() > 0).all() and log["gradient_norm"].notna().sum() == 16

    class Other(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            optimizer.param_groups[0]["lr"] = 0.5 if trainer.global_step == 3 else optimizer.param_groups[0]["lr"]

    with pytest.raises(RaceError, match="at step 3 it should be 0.00025"):
        train_e1(tmp_path / "other", cache, Other(), learning_rate=1e-3, schedule="cosine", warmup=0.75)


def test_clipping_is_torchs_on_the_whole_batch(cache):
    """In two micro-batches and in one: the gradient of the batch is clipped, not that of a part."""
    steps = []
    for budget in (None, 600):
        pl.seed_everything(0, verbose=False)
        module = start_stage(Stage("e1"), cache, learning_rate=1e-3, token_budget=budget, max_grad_norm=0.01)
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(max_steps=1, **settings).fit(module, RaceDataModule(cache, batch_size=8, limit_questions=32))
        steps.append([parameter.grad.clone() for parameter in module.parameters()])
    for whole, parts in zip(*steps, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
    assert torch.stack([part.norm() for part in steps[0]]).norm() == pytest.approx(0.01, rel=1e-4)


def test_clipping_in_fp16_is_of_the_unscaled_gradient(cache, monkeypatch):
    """The loss is scaled by 2^16 there; torch's scaler also knows the CPU."""
    module = start_stage(Stage("e1"), cache, max_grad_norm=0.5)
    scaler, logged = torch.amp.GradScaler("cpu"), {}
    module._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    optimizer = module.configure_optimizers()
    scaler.scale(sum(parameter.sum() for parameter in module.parameters())).backward()
    module.clip_gradient(SimpleNamespace(optimizer=optimizer))
    count = sum(parameter.numel() for parameter in module.parameters())
    assert logged["gradient_norm"] == pytest.approx(count**0.5, rel=1e-4)
    norms = torch.stack([parameter.grad.norm() for parameter in module.parameters()])
    assert norms.norm() == pytest.approx(0.5, rel=1e-4)


def test_the_rule_of_selection(tmp_path, capsys):
    """The highest accuracy, or the lowest loss: the rule that a stage was trained with, unless another is asked for."""
    numbers = [(0.9, 0.60), (0.7, 0.64), (2.03, 0.705), (2.1, 0.705), (float("nan"), 0.9)]
    for epoch, (loss, accuracy) in enumerate(numbers):
        record = {"stage": "e2", "epoch": epoch, "metrics": {"val_loss_epoch": loss, "val_acc": accuracy}}
        torch.save({"race": record | {"recipe": {"monitor": "val_acc"}}}, tmp_path / f"e2-epoch={epoch}.ckpt")
    assert Stage("e2", tmp_path).best().epoch == 2 and Stage("e2", tmp_path, monitor="val_loss_epoch").best().epoch == 1
    assert Stage("e3", tmp_path, monitor="val_loss_epoch").before.best().epoch == 2
    best = Stage("e2", tmp_path).best()
    assert other_rule(best, by_the_other_rule(best)) == (
        "\nvalidation: loss 2.030, accuracy 70.5 %; by validation loss the best would be epoch 1 "
        "(loss 0.700, accuracy 64.0 %)"
    )
    (tmp_path / "e2-x-val_loss_epoch=9.99.ckpt").write_bytes(best.path.read_bytes()[:300])
    assert Stage("e2", tmp_path, monitor="val_loss_epoch").best().epoch == 1
    with pytest.raises(RaceError, match="9.99.ckpt: "):  # its accuracy may be the highest
        Stage("e2", tmp_path).best()
    with pytest.raises(RaceError, match="MONITOR is 'loss', expected one of val_loss_epoch, val_acc"):
        Stage("e2", tmp_path, monitor="loss")


def test_a_schedule_that_changes_is_not_resumed(cache, tmp_path):
    """The rate of a step depends on all of it; a longer constant stage goes on as ever."""
    train_e1(tmp_path, cache, epochs=1, schedule="linear", warmup=2)
    changed = "SCHEDULE was 'linear', is 'cosine'; MAX_GRAD_NORM was None, is 1.0; .*MAX_EPOCHS.* was 8, is 16"
    with pytest.raises(RaceError, match=changed):
        train_e1(tmp_path, cache, epochs=2, schedule="cosine", warmup=2, max_grad_norm=1.0)


def test_a_rule_that_changes_is_not_resumed(cache, tmp_path):
    """The checkpoints say by which rule they were made; states of before have the loss."""
    stage = Stage("e1", tmp_path / "checkpoints", tmp_path / "run")
    train("e1", cache, tmp_path, 1e-3)
    module = start_stage(stage, cache, learning_rate=1e-3)
    data = RaceDataModule(cache, batch_size=16, limit_questions=48)
    assert "MONITOR" in (identity := stage_identity(module, data, "val_loss_epoch"))
    assert not changed_settings({"identity": {k: v for k, v in identity.items() if k != "MONITOR"}}, identity)
    with pytest.raises(RaceError, match="MONITOR was 'val_loss_epoch', is 'val_acc'"):
        train_stage(dataclasses.replace(stage, monitor="val_acc"), module, data, 2)


def test_a_warm_up_longer_than_the_stage_is_refused(cache, tmp_path):
    with pytest.raises(RaceError, match="WARMUP is 16 steps, the stage has 16: give fewer, or a share such as 0.1"):
        train_e1(tmp_path, cache, schedule="linear", warmup=16)


def test_a_fresh_run_of_a_stage_overwrites_nothing(cache, tmp_path, capsys):
    for fresh in (False, True):
        train("e1", cache, tmp_path, 1e-2, fresh=fresh)
    assert len(list((tmp_path / "checkpoints").glob("e1-*.ckpt"))) == 1
    assert len(list((tmp_path / "checkpoints" / "earlier").glob("e1-*/e1-albert*.ckpt"))) == 1
    assert len(list((tmp_path / "checkpoints" / "earlier").glob("e1-*/e1-state.ckpt"))) == 1
    assert "of an earlier run, from e1 on, are now in" in capsys.readouterr().out


def test_early_stopping_ends_a_stage(cache, tmp_path):
    module = train("e1", cache, tmp_path, 0.0, epochs=5, early_stopping=1)
    assert module.trainer.current_epoch == 2


def test_estimate_is_given_once(cache, tmp_path, capsys):
    report = StageReport(after_seconds=0.0)
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, callbacks=report)
    trainer.fit(start_stage(Stage("e1"), cache), RaceDataModule(cache, batch_size=16, limit_questions=48))
    out = capsys.readouterr().out
    assert out.count("for 2 epochs of 3 steps") == 1 and out.count(": validation loss") == 2


def test_effective_batch_does_not_depend_on_the_token_budget(cache):
    """One step with parts and one with the whole batch move the weights alike."""

    def step(token_budget: int):
        pl.seed_everything(0)
        module = start_stage(Stage("e1"), cache, learning_rate=1e-3, token_budget=token_budget).double()
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_epochs=1, precision="64-true", limit_val_batches=0, num_sanity_val_steps=0, **options)
        trainer.fit(module, RaceDataModule(cache, batch_size=16, limit_questions=20))
        assert trainer.global_step == 2
        return module.state_dict()

    whole, parts = step(1 << 20), step(600)
    assert all(torch.allclose(whole[name], parts[name], rtol=0, atol=1e-9) for name in whole)


@pytest.mark.parametrize("short", [0, 128])
def test_half_precision_trains(cache, tmp_path, monkeypatch, short):
    """bf16 autocast, as on a GPU: both ways of attention take it, and the weights stay float32."""
    monkeypatch.setattr("race.encoder.SHORT", short)
    module = train("e1", cache, tmp_path, 1e-3, precision="bf16-mixed")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    losses = read_log(tmp_path / "run", "e1")["train_loss_step"].dropna()
    assert len(losses) == 3 and losses.between(1.2, 1.6).all()


@pytest.mark.parametrize(
    ("capability", "precision"),
    [(None, "32-true"), ((7, 0), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")],
)
def test_precision_by_device(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert default_precision() == precision


def test_decoded_question_shows_text_options_and_segments(cache):
    data = RaceDataModule(cache)
    table, text = decoded_question(data.dataset("train"), 0), data.train_dataset.text(0)
    assert list(table.index) == ["A", "B", "C", "D"] and list(table["answer"]).index("correct") == text["label"]
    for option, row in zip(text["options"], table.itertuples(), strict=True):
        assert option.lower() in row[4].lower() and row[4].endswith("[SEP]") and row[3].startswith("[CLS]")


def test_a_stage_that_the_chain_does_not_have():
    with pytest.raises(RaceError, match="expected one of e1, e2, e3"):
        Stage("e4")


def test_the_best_of_each_stage_and_the_latest(chain):
    best = best_checkpoints(chain / "checkpoints")
    assert [checkpoint.stage for checkpoint in best] == ["e1", "e2", "e3"]
    assert latest_checkpoint(chain / "checkpoints").path == best[-1].path
    with pytest.raises(RaceError, match="no checkpoints: run ex01.ipynb first"):
        latest_checkpoint(chain)


def test_checkpoints_are_named_after_their_model(cache, tmp_path):
    """A BERT's is not called albert."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=1000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    module = RaceModule(config=config)
    train_stage(at(tmp_path, "e1"), module, RaceDataModule(cache, limit_questions=8), 1)
    assert at(tmp_path, "e1").best().name.startswith("e1-bert-race-epoch=00-val_loss_epoch=")


def test_missing_bases_are_explained(cache, tmp_path):
    with pytest.raises(RaceError, match="no checkpoint of stage e1: run ex01.ipynb first"):
        start_stage(Stage("e2", tmp_path), cache)
    with pytest.raises(RaceError, match="no such checkpoint"):
        start_stage(Stage("e2"), cache, base_checkpoint=tmp_path / "none.ckpt")


def test_a_cache_without_weights_needs_a_base_model(corpus, cache, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    from race.data.cache import build_cache

    for part in (AutoTokenizer, AutoConfig):
        part.from_pretrained(cache / "model").save_pretrained(tmp_path / "bare")
    build_cache(str(corpus), str(tmp_path / "bare"), tmp_path / "cache")
    with pytest.raises(RaceError, match="keeps no weights"):
        start_stage(Stage("e1"), tmp_path / "cache")
    assert start_stage(Stage("e1"), tmp_path / "cache", base_model=cache / "model")
    RaceModule(model=cache / "model").model.save_pretrained(tmp_path / "weights")
    assert start_stage(Stage("e1"), tmp_path / "cache", base_model=tmp_path / "weights"), (
        "weights without a tokenizer will do"
    )


def test_a_base_model_with_another_tokenizer_is_refused(cache, tmp_path):
    from transformers import AlbertTokenizer

    pieces = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "▁", "a"]
    AlbertTokenizer(vocab=[(piece, 0.0) for piece in pieces]).save_pretrained(tmp_path)
    RaceModule(model=cache / "model").model.save_pretrained(tmp_path)
    with pytest.raises(RaceError, match="another tokenizer than .*small: make a cache with"):
        start_stage(Stage("e1"), cache, base_model=tmp_path)


def test_the_first_line_says_what_is_in_force(cache, tmp_path, capsys):
    """Device, precision, attention, and the micro-batches of the eight longest questions."""
    train_e1(tmp_path, cache, epochs=1, data={"limit_questions": 16}, token_budget=2000, precision="bf16-mixed")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("e1 runs on ")]
    dataset = RaceDataModule(cache, 8, limit_questions=16).dataset("train")
    parts = len(part_ends(dataset.lengths()[dataset.length_order()[:8]], 2000))
    assert line == (
        f"e1 runs on CPU, {torch.get_num_threads()} threads, bf16-mixed, attention sequence by sequence (up to 128 "
        f"tokens in one masked call); micro-batches in its longest step: {parts} (TOKEN_BUDGET 2,000)"
    )


def test_deterministic_algorithms_on_request(cache, tmp_path):
    """While the stage is trained; what the user has set is there again afterwards, and stays on meanwhile."""
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(torch.are_deterministic_algorithms_enabled())

    train_e1(tmp_path / "a", cache, Look(), epochs=1, data={"limit_questions": 8}, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        train_e1(tmp_path / "b", cache, Look(), epochs=1, data={"limit_questions": 8})
        assert seen == [True, True] and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_reaches_the_layers(cache, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("race.train.training.compile_layers", seen.append)
    for wish in (False, True):
        train_e1(tmp_path / str(wish), cache, epochs=1, data={"limit_questions": 8}, compile=wish)
    assert len(seen) == 1


def test_weights_in_half_precision_are_refused_by_name(cache, tmp_path):
    with pytest.raises(RaceError, match="PRECISION is 'bf16-true'"):
        train_e1(tmp_path, cache, precision="bf16-true")
