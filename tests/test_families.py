"""Every family of encoders computes what Hugging Face's own model computes, packed or padded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import padded
from tiny_models import PADDED, tiny_config
from transformers import AttentionInterface, AutoModelForMultipleChoice, GPT2Config, T5Config
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from race import OPTIONS, RaceError
from race.attention import packed_attention
from race.data import collate
from race.encoder import PACKED, attention_dropout, longest_input, pads_left, takes_segments
from race.models import REFUSED, check_family
from race_module import RaceModule

OTHER_WAYS = {"modernbert-mean": ("modernbert", {"classifier_pooling": "mean"})}
CASES = {name: (name, {}) for name in [*PACKED, *PADDED]} | OTHER_WAYS


# Softmax or positions are in float32 in these, whatever the model's type; Longformer's gradients in float64 are NaN.
TOLERANCE = {"flaubert": 1e-6, "roformer": 1e-6, "xlm": 1e-6, "longformer": 1e-4}


def close(ours: torch.Tensor, theirs: torch.Tensor, scale: float, family: str = "") -> bool:
    return (ours - theirs).abs().max().item() <= TOLERANCE.get(family, 1e-9) * scale


def questions(items, family: str, count: int, longest: int) -> list[dict]:
    """Questions that begin with 0, end with 2, and have one segment where the family knows no second one."""
    made = items(count, longest=longest)
    for item in made:
        for ids, segments in zip(item["input_ids"], item["token_type_ids"], strict=True):
            ids[0], ids[-1] = 0, 2
            if family == "longformer":  # it looks for three separators
                ids[len(ids) // 2 : len(ids) // 2 + 2] = 2
            if family in ("xlm-roberta-xl", "roberta", "xlm", "flaubert"):
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


@pytest.mark.parametrize("longest", [40, 200], ids=["short", "long"])
def test_logits_loss_and_gradients_equal_hugging_face(pair, items, longest):
    family, module, reference = pair
    chosen = questions(items, family, 4, longest)
    expected = torch.cat([theirs_for(reference, item) for item in chosen])
    labels = torch.tensor([item["label"] for item in chosen])
    F.cross_entropy(expected, labels).backward()
    theirs = {name: it.grad for name, it in reference.named_parameters() if it.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    batch = collate(chosen)
    logits = module(batch)
    assert logits.shape == (4, OPTIONS)
    assert expected.std() > 1e-4
    assert close(logits, expected, expected.abs().max().item(), family)

    module.manual_backward = lambda loss: loss.backward()
    for budget in (None, 1, 4 * OPTIONS * longest // 2):  # the whole batch, and parts of it
        module.zero_grad()
        module.token_budget = budget
        loss = module.model_step(batch, "train")
        assert close(loss, F.cross_entropy(expected, labels), 1.0, family)
        ours = {name: it.grad for name, it in module.model.named_parameters() if it.grad is not None}
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert close(ours[name], gradient, largest, family), name


def test_a_checkpoint_keeps_the_configuration(pair, items):
    family, module, _ = pair
    again = RaceModule(config=copy.deepcopy(module.hparams["config"])).to(next(module.parameters()).dtype).eval()
    again.model.load_state_dict(module.model.state_dict())
    batch = collate(questions(items, family, 2, 40))
    assert torch.equal(again(batch), module.eval()(batch))


def test_every_family_runs_or_is_refused_by_name():
    assert {*PACKED, *PADDED, *REFUSED} == {*MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES}
    for family in REFUSED:
        with pytest.raises(RaceError, match=f"type '{family}' is not run: "):
            check_family(tiny_config(family))


@pytest.mark.parametrize("config", [GPT2Config(), T5Config()], ids=["gpt2", "t5"])
def test_other_models_are_refused(config):
    with pytest.raises(RaceError, match=f"'{config.model_type}' has no multiple-choice head .* albert, bert, "):
        RaceModule(config=config)


@pytest.mark.parametrize("family", PACKED)
def test_packed_attention_gets_no_mask(family, items, monkeypatch):
    """Of T tokens a mask would have T × T places; ModernBERT makes one unless it is told otherwise."""
    module, seen = RaceModule(config=tiny_config(family)), []
    monkeypatch.setitem(
        module.model.base_model.config.__dict__, "_attn_implementation_internal", spy(seen, monkeypatch)
    )
    module(collate(questions(items, family, 2, 40)))
    assert len(seen) == module.model.config.num_hidden_layers and set(seen) == {None}


def spy(seen: list, monkeypatch) -> str:
    def attention(module, query, key, value, attention_mask, *rest, **settings):
        seen.append(attention_mask)
        return packed_attention(module, query, key, value, attention_mask, *rest, **settings)

    AttentionInterface.register("spied", attention)
    AttentionMaskInterface.register("spied", sdpa_mask)
    return "spied"


@pytest.mark.parametrize("family", ["deberta-v2", "xlnet"])
def test_padded_heads_stay_in_float32(family, items):
    module, seen = RaceModule(config=tiny_config(family)).eval(), []
    head = [part for name, part in module.model.named_children() if name in ("classifier", "logits_proj")]
    head[0].register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    batch = collate(questions(items, family, 3, 40))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(batch).dtype == torch.float32
        copied = copy.deepcopy(module)
        with pytest.raises(RuntimeError, match="broken"):
            head_of(copied).forward = broken
            copied(batch)
        assert torch.is_autocast_enabled("cpu")  # also after an error within the head
    assert seen == [torch.float32] * 2


def head_of(module):
    return module.model.classifier if hasattr(module.model, "classifier") else module.model.logits_proj


def broken(*_):
    raise RuntimeError("broken")


def test_attention_dropout_is_that_of_the_configuration():
    for family, name in (("roberta", "attention_probs_dropout_prob"), ("distilbert", "attention_dropout")):
        config = tiny_config(family, **{name: 0.1, "initializer_range": 0.2})
        assert getattr(RaceModule(config=config).model.config, name) == 0.1
        module = RaceModule(config=config, attention_dropout=0)
        kept = module.hparams["config"]
        assert kept[name] == 0 and attention_dropout(module.model.config) == 0
    with pytest.raises(RaceError, match="ATTENTION_DROPOUT = 0: a model of type 'xlnet' has no such setting"):
        RaceModule(config=tiny_config("xlnet"), attention_dropout=0)
    with pytest.raises(RaceError, match="attention_dropout is 1"):
        RaceModule(config=tiny_config("roberta"), attention_dropout=1)


def test_longest_input_leaves_out_the_places_before_the_first():
    assert longest_input(RaceModule(config=tiny_config("roberta", max_position_embeddings=34)).model) == 32
    assert longest_input(RaceModule(config=tiny_config("xlnet")).model) is None


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bert", {"is_decoder": True}, "makes a decoder of it"),
        ("xlnet", {"attn_type": "uni"}, "makes a decoder of it"),
    ],
)
def test_settings_that_make_another_model_are_refused(family, settings, message):
    with pytest.raises(RaceError, match=message):
        RaceModule(config=tiny_config(family, **settings))


def test_a_short_question_does_not_change_how_bigbird_attends(items):
    module = RaceModule(config=tiny_config("big_bird", block_size=4, num_random_blocks=1)).eval()
    long, short = items(2, longest=200)[0], items(1, seed=1, longest=12)[0]
    before = module(collate([long]))
    both, after = module(collate([long, short])), module(collate([long]))
    assert torch.allclose(both[:1], before, atol=1e-5) and torch.equal(after, before)


def test_half_precision_in_a_configuration_is_not_taken(items):
    module = RaceModule(config=tiny_config("roberta", dtype="bfloat16"))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_parts_of_a_padded_batch_hold_their_padding(items):
    batch = collate(sorted(items(9), key=lambda item: -max(map(len, item["input_ids"]))))
    parts = list(batch.micro_batches(400, padded=True))
    assert 2 < len(parts) < 9 and sum(map(len, parts)) == 9
    assert all(max(part.lengths) * len(part.lengths) <= 400 or len(part) == 1 for part in parts)
    whole = [max(part.lengths) * len(part.lengths) + 4 * max(part.lengths) > 400 for part in parts[:-1]]
    assert all(whole)  # one more question would not have fitted
