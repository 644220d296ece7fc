"""Which models are not run here, and why."""

from race import RaceError

DEPENDS = "its answer to a question depends on the padding, and so on the questions beside it"
UNUSED = "nobody trains it for this task"
REFUSED = {
    "canine": "it reads characters, and 512 of them hold no article of RACE",
    "convbert": DEPENDS,
    "flaubert": UNUSED,
    "fnet": DEPENDS,
    "funnel": DEPENDS,
    "luke": "its tokenizer puts no special tokens around texts without entities",
    "mobilebert": DEPENDS,
    "mra": DEPENDS,
    "nystromformer": DEPENDS,
    "roc_bert": "it reads the shape and the sound of each character, which a cache does not hold",
    "roformer": UNUSED,
    "xlm": UNUSED,
    "xmod": "its adapters fail in half precision",
    "yoso": DEPENDS,
}


def check_family(config, model=None) -> None:
    """Raise RaceError unless a configuration is that of an encoder with a multiple-choice head that runs here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as HEADS

    family, name = config.model_type, "" if model is None else f"{model}: "
    if family in REFUSED:
        raise RaceError(f"{name}a model of type {family!r} is not run: {REFUSED[family]}; docs/models.md lists others")
    if getattr(config, "is_decoder", False) or getattr(config, "attn_type", "bi") == "uni":
        raise RaceError(f"{name}its config.json makes a decoder of it (is_decoder, attn_type); an encoder is expected")
    if family not in HEADS:
        known = ", ".join(sorted(HEADS.keys() - REFUSED))
        raise RaceError(
            f"{name}a model of type {family!r} has no multiple-choice head in transformers; expected one of {known}"
        )
