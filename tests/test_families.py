"""Every family of encoders computes what Hugging Face's own model computes, packed or padded."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import padded
from tiny_models import PADDED, tiny_config
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AutoModelForMultipleChoice, GPT2Config
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from race import OPTIONS, RaceError, attention
from race.attention import packed_attention
from race.data import collate
from race.encoder import (
    PACKED,
    attention_dropout,
    compile_layers,
    load_model,
    longest_input,
    option_logits,
    pads_left,
    takes_segments,
)
from race.models import REFUSED, check_family
from race_module import RaceModule

# Two groups of two inner layers, applied four times: every way in which ALBERT shares weights.
SHARED = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 16}
CASES = {name: (name, {}) for name in [*PACKED, *PADDED]} | {"albert": ("albert", SHARED)}
CASES |= {"modernbert-mean": ("modernbert", {"classifier_pooling": "mean"})}
CASES |= {"electra-narrow": ("electra", {"embedding_size": 16})}


def close(ours: torch.Tensor, theirs: torch.Tensor, scale: float, family: str) -> bool:
    """Equal to 1e-9 of `scale`, the largest value of its kind: a gradient that is zero in theory is noise in both."""
    tolerance = 1e-4 if family == "longformer" else 1e-9  # whose gradients in float64 are NaN
    return (ours - theirs).abs().max().item() <= tolerance * scale


def questions(items, family: str, count: int, longest: int, options: int = 4) -> list[dict]:
    """Questions that begin with 0, end with 2, and have one segment where the family knows no second one."""
    made = items(count, longest=longest, options=options)
    for item in made:
        for ids, segments in zip(item["input_ids"], item["token_type_ids"], strict=True):
            ids[0], ids[-1] = 0, 2
            if family == "longformer":  # it looks for three separators
                ids[len(ids) // 2 : len(ids) // 2 + 2] = 2
            if family in ("xlm-roberta-xl", "roberta"):
                segments[:] = 0
    return made


@pytest.fixture(params=CASES)
def pair(request):
    """A RaceModule and the untouched Hugging Face model with the same weights, in float64, in training mode."""
    family, settings = CASES[request.param]
    dtype = torch.float32 if family == "longformer" else torch.float64
    torch.manual_seed(0)
    reference = AutoModelForMultipleChoice.from_config(tiny_config(family, **settings)).to(dtype).train()
    with torch.no_grad():
        for parameter in filter(lambda it: it.requires_grad, reference.parameters()):  # new biases are zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    module = RaceModule(config=tiny_config(family, **settings)).to(dtype).train()
    module.model.load_state_dict(reference.state_dict())
    return family, module, reference


def theirs_for(reference, item: dict) -> torch.Tensor:
    """[1, 4] logits of one question alone, padded by Hugging Face's rules."""
    inputs = padded(collate([item]), left=pads_left(reference), padding=reference.config.pad_token_id)
    inputs.pop("labels")
    if not takes_segments(reference):
        inputs.pop("token_type_ids")
    return reference(**inputs).logits


@pytest.mark.parametrize(("longest", "options"), [(40, 3), (200, 4)], ids=["short", "long"])
def test_logits_loss_and_gradients_equal_hugging_face(pair, items, longest, options):
    """Of the whole batch, of its questions, and of parts; and of a module made from the configuration that is kept."""
    family, module, reference = pair
    chosen = questions(items, family, 4, longest, options)
    expected = torch.cat([theirs_for(reference, item) for item in chosen])
    labels = torch.tensor([item["label"] for item in chosen])
    F.cross_entropy(expected, labels).backward()
    theirs = {name: it.grad for name, it in reference.named_parameters() if it.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    batch = collate(chosen)
    logits = module(batch)
    assert logits.shape == (4, options) and expected.std() > 1e-4
    assert close(logits, expected, expected.abs().max().item(), family)

    module.manual_backward = lambda loss: loss.backward()
    for budget in (None, 1, 2 * options * longest):
        module.zero_grad()
        module.token_budget = budget
        loss = module.model_step(batch, "train")
        assert close(loss, F.cross_entropy(expected, labels), 1.0, family)
        ours = {name: it.grad for name, it in module.model.named_parameters() if it.grad is not None}
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert close(ours[name], gradient, largest, family), name

    again = RaceModule(config=copy.deepcopy(module.hparams["config"])).to(logits.dtype)
    again.model.load_state_dict(module.model.state_dict())
    assert torch.equal(again(batch), logits)


SEEN = ["convbert", "fnet", "funnel", "nystromformer", "yoso"]  # refused by what they answer beside a longer question
SUMMARIES = {"electra": ("last", "mean", "cls_index"), "xlnet": ("mean", "cls_index")}
SETTINGS = [(family, {"summary_type": kind}) for family, kinds in SUMMARIES.items() for kind in kinds]
SETTINGS += [("xlnet", {"bi_data": True}), *((family, {}) for family in SEEN)]


def test_every_family_runs_or_is_refused_by_name():
    assert {*PACKED, *PADDED, *REFUSED, *SEEN} == {*MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES}
    for family in REFUSED:
        with pytest.raises(RaceError, match=f"type '{family}' is not run here"):
            check_family(tiny_config(family))


@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_what_answers_otherwise_than_hugging_face_is_refused(family, settings, tmp_path):
    """When a model is opened: by its weights or its configuration. A checkpoint of this repository is not asked."""
    config = tiny_config(family, **settings)
    AutoModelForMultipleChoice.from_config(config).save_pretrained(tmp_path)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(
        RaceError, match=f"^{tmp_path}: its type, or a setting of its config.json, is not run here .* by "
    ):
        load_model(tmp_path, None, None)
    assert (torch.get_rng_state() == states[0]).all() and states[1:] == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )
    with pytest.raises(RaceError, match="^this model: its type, or a setting"):
        load_model(None, config, None)
    assert load_model(None, config.to_dict(), None).training


@pytest.mark.parametrize(
    ("family", "settings"), [("albert", {"num_hidden_layers": 18, "num_hidden_groups": 14}), ("roberta", {})]
)
def test_groups_that_do_not_divide_the_layers_and_padding_tokens_in_a_text(family, settings, items):
    model, (item, longer) = load_model(None, tiny_config(family, **settings), None).eval(), items(2)
    for ids in item["input_ids"]:
        ids[2:4] = 1  # padding, as a text may spell it out
    with torch.no_grad():
        alone = theirs_for(model, item)
        assert torch.allclose(option_logits(model, collate([longer, item]))[4:].view(1, 4), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPT2Config(), "'gpt2' is not run here .* albert, bert, "),
        (tiny_config("bert", is_decoder=True), "decoder"),
        (tiny_config("xlnet", attn_type="uni"), "decoder"),
    ],
)
def test_other_models_are_refused(config, said):
    with pytest.raises(RaceError, match=said):
        RaceModule(config=config)


@pytest.mark.parametrize("family", PACKED)
def test_packed_attention_gets_no_mask(family, items, monkeypatch):
    """Of T tokens a mask would have T × T places; ModernBERT makes one unless it is told otherwise."""
    module, seen = RaceModule(config=tiny_config(family)), []

    def attention(module, query, key, value, attention_mask, *rest, **settings):
        seen.append(attention_mask)
        return packed_attention(module, query, key, value, attention_mask, *rest, **settings)

    AttentionInterface.register("spied", attention)
    AttentionMaskInterface.register("spied", sdpa_mask)
    monkeypatch.setitem(vars(module.model.base_model.config), "_attn_implementation_internal", "spied")
    module(collate(questions(items, family, 2, 40)))
    assert seen == [None] * module.model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["deberta-v2", "xlnet"])
def test_padded_heads_stay_in_float32(family, items):
    module, seen = RaceModule(config=tiny_config(family)).eval(), []
    head = module.model.classifier if family == "deberta-v2" else module.model.logits_proj
    head.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    batch = collate(questions(items, family, 3, 40))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(batch).dtype == torch.float32
        assert torch.equal(copy.deepcopy(module)(batch), module(batch))
        head.weight = None
        with pytest.raises(TypeError):
            module(batch)
        assert torch.is_autocast_enabled("cpu")  # also after an error within the head
    assert {*seen} == {torch.float32}


def test_attention_dropout_is_that_of_the_configuration():
    for family, name in (("roberta", "attention_probs_dropout_prob"), ("distilbert", "attention_dropout")):
        config = tiny_config(family, **{name: 0.1, "initializer_range": 0.2})
        assert getattr(RaceModule(config=config).model.config, name) == 0.1
        module = RaceModule(config=config, attention_dropout=0)
        assert module.hparams["config"][name] == 0 and attention_dropout(module.model.config) == 0
    with pytest.raises(RaceError, match="ATTENTION_DROPOUT = 0: a model of type 'xlnet' has no such setting"):
        RaceModule(config=tiny_config("xlnet"), attention_dropout=0)


def test_longest_input_leaves_out_the_places_before_the_first():
    assert longest_input(RaceModule(config=tiny_config("roberta", max_position_embeddings=34)).model) == 32
    assert longest_input(RaceModule(config=tiny_config("xlnet")).model) is None


def test_a_short_question_does_not_change_how_bigbird_attends(items):
    module = RaceModule(config=tiny_config("big_bird", block_size=4, num_random_blocks=1)).eval()
    long, short = items(2, longest=200)[0], items(1, seed=1, longest=12)[0]
    before = module(collate([long]))
    both, after = module(collate([long, short])), module(collate([long]))
    assert torch.allclose(both[:1], before, atol=1e-5) and torch.equal(after, before)


def test_half_precision_in_a_configuration_is_not_taken():
    module = RaceModule(config=tiny_config("roberta", dtype="bfloat16"))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def varlen(query, key, value, query_ends, ends, rows, longest, scale=None, window_size=(-1, -1)):
    """What the variable-length kernel computes, on any device: one attention call with a mask of [T, T]."""
    assert window_size[0] == window_size[1]
    sequences, places = [], []
    for of, states in ((query_ends, query), (ends, key)):
        place = torch.arange(len(states), device=ends.device)
        sequences.append(torch.bucketize(place, of[1:], right=True))
        places.append(place - of[sequences[-1]])
    mask = sequences[0][:, None] == sequences[1]
    if window_size[0] >= 0:
        mask = mask & ((places[0][:, None] - places[1]).abs() <= window_size[0])
    states = (it.transpose(0, 1) for it in (query, key, value))
    return F.scaled_dot_product_attention(*states, mask, scale=scale).transpose(0, 1)


@pytest.mark.parametrize(
    ("family", "kernel"), [*((family, True) for family in PACKED), ("albert", False), ("modernbert", False)]
)
def test_compiled_layers_compute_the_same_with_few_graphs(family, kernel, items, monkeypatch):
    """In float64, with attention inside the graphs (as of the kernel on a GPU) and outside; no batch compiles anew."""
    torch._dynamo.reset()
    counters.clear()
    if kernel:
        monkeypatch.setattr("race.attention.has_varlen", lambda *_: True)
        monkeypatch.setattr("race.attention.varlen_attn", varlen)
    plain, compiled = (RaceModule(config=tiny_config(family)).double() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compile_layers(compiled.model, "eager")  # the graphs, and no compiler of them
    graphs = []
    for longest in (200, 60, 230, 90):
        batch = collate(questions(items, family, 2 + longest % 4, longest))
        losses = [module.loss(module(batch), batch.labels) for module in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[-1] == graphs[1] <= (3 if kernel else 8), graphs
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["albert", "bert", "modernbert"])
def test_one_masked_call_computes_what_a_call_for_each_sequence_does(family, items, monkeypatch):
    """On a GPU up to 512 tokens, unless padding more than doubles the tokens."""
    module, masked, found = RaceModule(config=tiny_config(family)).double(), attention._masked_attention, []
    batch = collate(questions(items, family, 5, 300))
    for short in (0, 512):
        monkeypatch.setitem(attention.SHORT, "cpu", short)
        loss = module.loss(module(batch), batch.labels)
        gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        found.append([loss, *(it for it in gradients if it is not None)])
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(*found, strict=True))
    calls = []
    monkeypatch.setattr(attention, "_masked_attention", lambda *it, **how: calls.append(it) or masked(*it, **how))
    short, long = questions(items, family, 9, 12), questions(items, family, 1, 300)
    long[0]["input_ids"] = [np.resize(ids, 300) for ids in long[0]["input_ids"]]
    long[0]["token_type_ids"] = [np.zeros(300, int)] * OPTIONS
    module(collate(short + long))
    assert not calls
    module(collate(long))
    assert len(calls) == module.model.config.num_hidden_layers
