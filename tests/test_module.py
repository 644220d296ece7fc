"""RaceModule computes what Hugging Face's model computes, on packed tokens; its checkpoints travel."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ALBERT, ROOT, padded
from transformers import AlbertConfig, AlbertForMultipleChoice, BertForMultipleChoice, YosoConfig

from race import RaceError
from race.data import RaceDataModule, collate
from race.encoder import compile_layers
from race.memory import CPU_TOKENS, token_budget, token_budget_for
from race_module import RaceModule

REFERENCE = {"albert": AlbertForMultipleChoice, "bert": BertForMultipleChoice}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def close(ours: torch.Tensor, theirs: torch.Tensor, scale: float) -> bool:
    """Equal to 1e-9 of `scale`, the largest value of its kind: a gradient that is zero in theory is noise in both."""
    return (ours - theirs).abs().max().item() <= 1e-9 * scale


@pytest.fixture(params=[("albert", 0), ("albert", 128), ("bert", 0), ("bert", 128)], ids=str)
def pair(request, monkeypatch):
    """A RaceModule and the untouched Hugging Face model with the same weights, in float64, in training mode.

    Once with an attention call for each sequence, once with the one call that short sequences get.
    """
    family, short = request.param
    monkeypatch.setattr("race.attention.SHORT", short)
    config = request.getfixturevalue(f"{family}_config")
    torch.manual_seed(0)
    reference = REFERENCE[family](config).double().train()
    with torch.no_grad():
        for parameter in reference.parameters():  # new biases are zero, which would hide what forgets them
            parameter.add_(0.1 * torch.randn_like(parameter))
    module = RaceModule(config=config).double().train()
    module.model.load_state_dict(reference.state_dict())
    return module, reference


def test_logits_loss_and_gradients_equal_hugging_face(pair, items):
    module, reference = pair
    batch = collate(items(7))
    expected = reference(**padded(batch))
    expected.loss.backward()
    logits = module(batch)
    loss = F.cross_entropy(logits, batch.labels)
    loss.backward()
    assert logits.shape == (7, 4)
    assert close(logits, expected.logits, expected.logits.abs().max().item())
    assert close(loss, expected.loss, expected.loss.item())
    ours, theirs = gradients(module.model), gradients(reference)
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name in theirs:
        assert close(ours[name], theirs[name], largest), name
    assert (
        min(
            gradient.abs().max().item()
            for name, gradient in theirs.items()
            if not name.endswith(("key.bias", "classifier.bias"))
        )
        > 1e-6 * largest
    )


@pytest.mark.parametrize("budget", [1, 150, 400])
def test_gradient_of_parts_equals_the_whole(pair, items, budget):
    module, _ = pair
    batch = collate(items(7))
    F.cross_entropy(module(batch), batch.labels).backward()
    whole = gradients(module)
    module.zero_grad()
    module.token_budget = budget
    module.manual_backward = lambda loss: loss.backward()
    module.log = lambda *_, **__: None
    loss = module.model_step(batch, "train")
    assert len(list(batch.micro_batches(budget))) > 1
    assert close(loss, F.cross_entropy(module(batch), batch.labels), 1.0)
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in gradients(module).items():
        assert close(gradient, whole[name], largest), name


def test_padded_call_of_the_inner_model_still_works(pair, items):
    module, reference = pair
    batch = collate(items(3))
    expected = reference(**padded(batch)).logits
    assert close(module.model(**padded(batch)).logits, expected, expected.abs().max().item())


def test_sequences_do_not_see_each_other(albert_config, items):
    module = RaceModule(config=albert_config).eval()
    many, few = items(5), items(5)[:2]
    assert torch.allclose(module(collate(many))[:2], module(collate(few)), atol=1e-6)


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_every_input_reaches_the_model(albert_config, items, name):
    module = RaceModule(config=albert_config).eval()
    batch, other = collate(items(2)), collate(items(2))
    setattr(other, name, torch.ones_like(getattr(other, name)))
    assert not torch.allclose(module(batch), module(other), atol=1e-4)


def test_dropout_is_applied_in_training_only(albert_config, items):
    albert_config.attention_probs_dropout_prob = 0.5
    module, batch = RaceModule(config=albert_config), collate(items(2))
    assert not torch.equal(module.train()(batch), module(batch))
    assert torch.equal(module.eval()(batch), module(batch))


@pytest.mark.parametrize("family", ["albert", "bert"])
def test_parameter_groups(family, request):
    """Every bias and layer norm is undecayed, everything else decayed, nothing missing, nothing twice."""
    model = RaceModule(config=request.getfixturevalue(f"{family}_config")).model
    decay, no_decay = parameter_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_decay, in_no_decay = ([names[id(p)] for p in group["params"]] for group in (decay, no_decay))
    assert sorted(in_decay + in_no_decay) == sorted(names.values())
    norms = {f"{name}." for name, part in model.named_modules() if isinstance(part, torch.nn.LayerNorm)}
    assert any("full_layer_layer_norm" in norm for norm in norms) == (family == "albert")
    expected = [name for name in names.values() if name.endswith(".bias") or name.startswith(tuple(norms))]
    assert sorted(in_no_decay) == sorted(expected)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.01, 0.0)


def test_optimizer_follows_the_recipe(albert_config):
    module = RaceModule(config=albert_config)
    optimizer = module.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert {(g["lr"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups} == {(2e-5, 1e-8, 0.0)}


def test_other_families_and_missing_weights_are_refused(tmp_path, albert_config):
    with pytest.raises(ValueError, match="type 'yoso' is not run"):
        RaceModule(config=YosoConfig())
    albert_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights"):
        RaceModule(model=tmp_path)
    with pytest.raises(ValueError, match="either model= .* or config="):
        RaceModule()


def test_weights_of_another_architecture_are_refused(tmp_path, bert_config, albert_config):
    BertForMultipleChoice(bert_config).save_pretrained(tmp_path)
    albert_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks .* weights of AlbertForMultipleChoice"):
        RaceModule(model=tmp_path)


def test_too_long_a_sequence_is_named(albert_config, items):
    albert_config.max_position_embeddings = 16
    with pytest.raises(ValueError, match="the model takes 16"):
        RaceModule(config=albert_config)(collate(items(4)))


def test_token_budget_grows_with_memory(albert_config):
    base = AlbertConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    for half in (False, True):
        budgets = [token_budget_for(base, 12_000_000, gigabytes << 30, half) for gigabytes in (1, 8, 16, 24, 40, 80)]
        assert budgets == sorted(budgets) and budgets[0] == 4 * 512 and budgets[-1] > 32 * 4 * 512
    assert token_budget_for(base, 12_000_000, 24 << 30, True) > 1.6 * token_budget_for(
        base, 12_000_000, 24 << 30, False
    )


@pytest.mark.parametrize("half", [False, True])
def test_token_budget_counts_the_bytes_that_a_step_takes(half):
    """Peak resident memory of steps of 2,048 and of 6,144 tokens, in a process of its own, against the formula."""
    code = (
        "import re, numpy as np, torch\n"
        "from transformers import AlbertConfig\n"
        "from race.data import collate\n"
        "from race_module import RaceModule\n"
        "sizes = {'hidden_size': 128, 'intermediate_size': 512, 'num_hidden_layers': 8, 'num_attention_heads': 2}\n"
        "module = RaceModule(config=AlbertConfig(vocab_size=1000, **sizes))\n"
        "module.manual_backward, module.log = torch.Tensor.backward, lambda *_, **__: None\n"
        "question = {'input_ids': [np.full(256, 7)] * 4, 'token_type_ids': [np.zeros(256, int)] * 4, 'label': 0}\n"
        "for questions in (2, 6):\n"
        f"    with torch.autocast('cpu', torch.bfloat16, {half}):\n"
        "        module.model_step(collate([question] * questions), 'train')\n"
        "    status = open('/proc/self/status').read()\n"  # getrusage would count what the parent had at the fork
        "    print(1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    small, large = map(int, run.stdout.split()[-2:])
    measured = (large - small) / 4096
    config = AlbertConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    first, second = (token_budget_for(config, 0, memory << 30, half) for memory in (16, 32))
    counted = 0.9 * (16 << 30) / (second - first)
    assert 0.9 <= counted / measured <= 1.35


def test_token_budget_on_cpu(albert_config):
    assert token_budget(RaceModule(config=albert_config).model, torch.device("cpu"), True) == CPU_TOKENS


def test_checkpoint_loads_without_network_cache_or_hub(cache, tmp_path):
    """Trained here, moved, loaded by another process in which no socket can be opened: the same logits."""
    import pytorch_lightning as pl

    module = RaceModule(model=cache / "model", learning_rate=1e-3)
    data = RaceDataModule(cache, batch_size=8, limit_questions=16)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    batch = collate([data.test_dataset[i] for i in range(4)])
    torch.save([batch.to("cpu").__dict__, module.eval()(batch).detach()], tmp_path / "expected.pt")
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
    with pytest.raises(RaceError, match="x.ckpt: holds no RaceModule that can be loaded"):
        RaceModule.load_from_checkpoint(tmp_path / "x.ckpt")


def test_a_damaged_base_model_is_named(albert_config, tmp_path):
    AlbertForMultipleChoice(albert_config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(RaceError, match=f"{tmp_path}: cannot be loaded safely"):
        RaceModule(model=tmp_path)


def test_a_checkpoint_that_brings_code_is_refused(tmp_path):
    import os

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"state_dict": {}, "hyper_parameters": {"config": Payload()}}, tmp_path / "bad.ckpt")
    with pytest.raises(RaceError, match="holds more than weights and plain values"):
        RaceModule.load_from_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "owned").exists()


def test_albert_base_takes_real_steps(real_cache):
    """albert-base's shape on real RACE text: finite losses near ln 4, and weights that move."""
    torch.manual_seed(0)
    module = RaceModule(config=AlbertConfig.from_pretrained(ALBERT))
    optimizer = module.configure_optimizers()
    data = RaceDataModule(real_cache, batch_size=1)
    before = module.model.classifier.weight.detach().clone()
    losses = []
    for _, batch in zip(range(3), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(batch), batch.labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(abs(loss - 1.386) < 0.4 for loss in losses), losses
    assert not torch.equal(before, module.model.classifier.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu_in_float64(pair, items, dtype):
    module, reference = pair
    batch = collate(items(7))
    expected = reference(**padded(batch)).logits
    module.float().cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        logits = module(batch.to("cuda")).double().cpu()
    assert torch.allclose(logits, expected, atol=1e-4 if dtype == torch.float32 else 0.1)


# -------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("family", ["albert", "bert"])
def test_pooler_head_and_loss_stay_in_float32(family, albert_config, bert_config, items):
    """Logits of a head in bf16 would have 8 bits, and questions with two equal best options."""
    module = RaceModule(config=albert_config if family == "albert" else bert_config).eval()
    batch, seen = collate(items(6)), []
    for part in (module.model.base_model.pooler, module.model.classifier):
        part.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = module.loss(batch)
    # the pooler of a BERT also runs within its own forward, on the first token of the batch, to no end
    assert len(seen) == (6 if family == "bert" else 4) and seen[-4:] == [torch.float32] * 4
    assert loss.dtype == torch.float32


def test_nothing_of_a_broken_off_forward_pass_is_kept(bert_config, items, monkeypatch):
    module = RaceModule(config=bert_config)
    key = module.model.base_model.encoder.layer[-1].attention.self.key

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(key, "forward", full)
        with torch.autocast("cpu", torch.bfloat16):
            module(collate(items(2)))
    casts = module.model.base_model.casts
    assert casts[-1].states is not None and casts[0].states is None
    assert copy.deepcopy(module).model.base_model.casts[-1].states is None
    module(collate(items(1)))
    assert casts[-1].states is None


@pytest.mark.parametrize("family", ["albert", "bert"])
def test_query_key_and_value_share_one_cast(family, albert_config, bert_config, items):
    module, seen = RaceModule(config=albert_config if family == "albert" else bert_config), []
    attentions = [it for it in module.modules() if {"query", "key", "value"} <= dict(it.named_children()).keys()]
    for attention in attentions:
        for name in ("query", "key", "value"):
            getattr(attention, name).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        module(collate(items(2)))
    assert seen[0] is seen[1] is seen[2] and seen[0].dtype == torch.bfloat16
    hooks = [hook for it in attentions for hook in it.value._forward_pre_hooks.values()]
    assert all(hook.states is None and hook.cast is None for hook in hooks)  # nothing is kept after the forward pass
    seen.clear()
    module(collate(items(2)))
    assert seen[0].dtype == torch.float32


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


def test_precision_plugin_keeps_the_casts_of_weights(cache, tmp_path):
    from small_stage import stage

    trainer = stage(tmp_path, cache, epochs=1, precision="bf16-mixed", data={"limit_questions": 8})
    assert type(trainer.precision_plugin).__qualname__ == "MixedPrecision"  # under this name states keep a loss scaler
    assert trainer.precision == "bf16-mixed" and trainer.precision_plugin.autocast_context_manager()._cache_enabled


# -------------------------------------------------------------------------------------------------- compiled layers


@pytest.mark.parametrize("family", ["albert", "bert"])
def test_compiled_layers_compute_the_same_with_few_graphs(family, albert_config, bert_config, items):
    """Twelve batches of other lengths and sizes: the graphs of the first ones serve all others."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain = RaceModule(config=albert_config if family == "albert" else bert_config)
    compiled = RaceModule(config=plain.model.config)
    compiled.load_state_dict(plain.state_dict())
    compile_layers(compiled.model, "aot_eager")  # graphs without a compiler of their code
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    graphs = []
    for number in range(12):
        batch = collate(items(2 + number % 5, seed=number, longest=30 + 15 * number))
        losses = [module.loss(batch)[0] for module in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] <= graphs[2] + 2 <= 16, graphs
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)
