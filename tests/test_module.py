"""RaceModule for those who know PyTorch: optimizer, clipping, half precision, compiled layers, checkpoints."""

import dataclasses
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from helpers import ROOT
from pytorch_lightning.plugins.precision import MixedPrecision
from transformers import BertForMultipleChoice

from race import RaceError
from race.data import RaceDataModule, collate
from race_module import RaceModule

OFF = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture(params=["albert_config", "bert_config"])
def config(request):
    return request.getfixturevalue(request.param)


def test_dropout_is_applied_in_training_only(config, items):
    config.attention_probs_dropout_prob = 0.5
    module, batch = RaceModule(config=config), collate(items(2))
    assert not torch.equal(module.train()(batch), module(batch))
    assert torch.equal(module.eval()(batch), module(batch))


def test_a_share_of_no_question_has_gradients_of_zero(config, items):
    """Of several processes, one with nothing to do: DDP waits for its gradients."""
    module = RaceModule(config=config)
    batch = collate([])
    loss = module.loss(module(batch), batch.labels)
    loss.backward()
    assert loss == 0 and module(collate([])).shape == (0, 4)
    assert not any(parameter.grad.any() for parameter in module.model.parameters())


def test_the_optimizer_is_that_of_the_recipe(config):
    """Every bias and layer norm is undecayed, everything else decayed, nothing missing, nothing twice."""
    module = RaceModule(config=config, weight_decay=0.01)
    optimizer, names = module.configure_optimizers(), {id(it): name for name, it in module.model.named_parameters()}
    assert type(optimizer) is torch.optim.AdamW
    assert {(group["lr"], group["eps"]) for group in optimizer.param_groups} == {(2e-5, 1e-8)}
    decay, no_decay = optimizer.param_groups
    in_decay, in_no_decay = ([names[id(it)] for it in group["params"]] for group in (decay, no_decay))
    norms = {f"{name}." for name, part in module.model.named_modules() if isinstance(part, torch.nn.LayerNorm)}
    assert any("full_layer_layer_norm" in norm for norm in norms) == (config.model_type == "albert")
    expected = [name for name in names.values() if name.endswith(".bias") or name.startswith(tuple(norms))]
    assert sorted(in_no_decay) == sorted(expected) and sorted(in_decay + in_no_decay) == sorted(names.values())
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.01, 0.0)


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD], ids=["fused", "another"])
def test_clipping_in_fp16_is_of_the_unscaled_gradient(cache, monkeypatch, optimizer):
    """The loss is scaled there; gradients of a fused optimizer, and of no other, are still scaled before its step."""
    if optimizer:
        monkeypatch.setattr(RaceModule, "configure_optimizers", lambda self: optimizer(self.parameters(), lr=1e-3))
    norms = []
    for plugin in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]):
        pl.seed_everything(0, verbose=False)
        module = RaceModule(model=cache / "model", max_grad_norm=0.01)
        trainer = pl.Trainer(max_steps=1, plugins=plugin, **OFF)
        trainer.fit(module, RaceDataModule(cache, batch_size=8, limit_questions=16))
        norms.append(trainer.callback_metrics["gradient_norm"].item())
        clipped = torch.stack([parameter.grad.norm() for parameter in module.parameters()]).norm()
        assert clipped.item() == pytest.approx(0.01, rel=1e-3)
    assert norms[1] == pytest.approx(norms[0], rel=0.1) and norms[0] > 0.01


def test_another_loss_trains_and_validation_is_cross_entropy(config, items, monkeypatch):
    module, batch = RaceModule(config=config).eval(), collate(items(3))
    plain = module.validation_step(batch, 0)
    monkeypatch.setattr(RaceModule, "loss", lambda module, logits, labels: logits.sum() * 70)
    assert torch.equal(module.validation_step(batch, 0), plain)


def test_pooler_head_and_loss_stay_in_float32(config, items):
    """Logits of a head in bf16 would have 8 bits, and questions with two equal best options."""
    module, seen = RaceModule(config=config).eval(), []
    for part in (module.model.base_model.pooler, module.model.classifier):
        part.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    batch = collate(items(6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.loss(module(batch), batch.labels)
    assert seen == [torch.float32] * 4 and loss.dtype == torch.float32


def test_query_key_and_value_share_one_cast(config, items):
    module, seen = RaceModule(config=config), []
    for attention in (it for it in module.modules() if {"query", "key", "value"} <= dict(it.named_children()).keys()):
        for name in ("query", "key", "value"):
            getattr(attention, name).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            module(collate(items(2)))
        assert seen[0] is seen[1] is seen[2] and seen[0].dtype == dtype


def test_gradients_in_bf16_are_as_near_to_float32_with_casts_kept(albert_config, items):
    """Casts of weights kept through a step, of one part and of several, against casts made anew each time."""
    module, batch = RaceModule(config=albert_config), collate(items(8))
    module.manual_backward = lambda loss: loss.backward()

    def gradients(budget: int | None, **autocast) -> torch.Tensor:
        module.zero_grad()
        module.token_budget = budget
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            module.model_step(batch, "train")
        return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])

    exact = gradients(None, enabled=False)
    for budget in (None, 200):
        kept, anew = ((gradients(budget, cache_enabled=cache) - exact).norm() for cache in (True, False))
        assert kept <= 1.1 * anew < 0.2 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu_in_float64(config, items, dtype):
    module, batch = RaceModule(config=config).double(), collate(items(7))
    expected = module(batch)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        logits = module.float().cuda()(batch.to("cuda")).double().cpu()
    assert torch.allclose(logits, expected, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_checkpoint_loads_without_network_cache_or_hub(cache, tmp_path):
    """Trained here, moved, loaded by another process in which no socket can be opened: the same logits."""
    module = RaceModule(model=cache / "model", learning_rate=1e-3)
    trainer = pl.Trainer(max_epochs=1, **OFF)
    trainer.fit(module, data := RaceDataModule(cache, batch_size=8, limit_questions=16))
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    batch = collate([data.val_dataset[i] for i in range(4)])
    torch.save([dataclasses.asdict(batch), module.eval()(batch).detach()], tmp_path / "expected.pt")
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import torch\n"
        "from race.data.batches import PackedBatch\n"
        "from race_module import RaceModule\n"
        "module = RaceModule.load_from_checkpoint('full.ckpt').eval()\n"
        "fields, expected = torch.load('expected.pt')\n"
        "assert module.learning_rate == 1e-3\n"
        "assert torch.equal(module(PackedBatch(**fields)), expected)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/nowhere", "HF_HOME": str(tmp_path / "empty")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # which decides the order of sums
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_checkpoint_without_settings_takes_those_given(albert_config, items, tmp_path):
    module = RaceModule(config=albert_config).eval()
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": {"of_others": 1}}, tmp_path / "x.ckpt")
    loaded = RaceModule.load_from_checkpoint(tmp_path / "x.ckpt", config=albert_config, learning_rate=1e-3).eval()
    batch = collate(items(2))
    assert torch.equal(loaded(batch), module(batch)) and loaded.learning_rate == 1e-3
    with pytest.raises(RaceError, match="x.ckpt: give either model="):
        RaceModule.load_from_checkpoint(tmp_path / "x.ckpt")


def test_a_base_that_is_none_is_refused(tmp_path, bert_config, albert_config, items):
    albert_config.save_pretrained(tmp_path)
    with pytest.raises(RaceError, match="has no weights"):
        RaceModule(model=tmp_path)
    BertForMultipleChoice(bert_config).save_pretrained(tmp_path)
    albert_config.save_pretrained(tmp_path)
    with pytest.raises(RaceError, match="lacks .* weights of AlbertForMultipleChoice"):
        RaceModule(model=tmp_path)
    with pytest.raises(RaceError, match="either model= .* or config="):
        RaceModule()
    with pytest.raises(RaceError, match="LEARNING_RATE is -1.*; ATTENTION_DROPOUT is 1"):
        RaceModule(config=albert_config, learning_rate=-1, attention_dropout=1)
    albert_config.max_position_embeddings = 16
    with pytest.raises(RaceError, match="the model takes 16"):
        RaceModule(config=albert_config)(collate(items(4)))
