"""Every family of encoders computes what Hugging Face's own model computes, packed or padded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import padded
from tiny_models import PADDED, tiny_config
from transformers import AutoModelForMultipleChoice, GPT2Config, T5Config
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from race import OPTIONS, RaceError
from race.data import collate
from race.families import PACKED, REFUSED, check_family, pads_left, takes_segments
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
    if not takes_segments(type(reference.base_model)):
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
