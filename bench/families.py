"""A training step of each family of encoders: ours against Hugging Face's model, padded to 512 or to a group's longest.

Random weights of half a base shape (6 layers of 384 places, 12 heads), the same questions for all, drawn at random;
forward, loss and backward in float32 without dropout, once more RoBERTa with the attention dropout that it comes with.
Hugging Face's model takes `--group` questions at a time. The sides take turns; the first turn is not counted.
"""

import argparse
import statistics

import torch

from bench.common import OURS, SIDES, draw, in_turn, pad, real_cache, report, spread, timed

SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
PLACES = {"max_position_embeddings": 514}  # they count from the padding id
OWN = {
    "roberta": PLACES,
    "xlm-roberta": PLACES,
    "mpnet": PLACES,
    "electra": {"embedding_size": 128},
    "distilbert": {"dim": 384, "n_layers": 6, "n_heads": 12, "hidden_dim": 1536},
    "modernbert": {"intermediate_size": 1024, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    | {"bos_token_id": 2, "eos_token_id": 3},  # gated: as many weights as 1,536 of others
    "deberta-v2": {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
    | {
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_biased_input": False,
        "pooler_hidden_size": 384,
    },
    "xlnet": {"d_model": 384, "n_layer": 6, "n_head": 12, "d_inner": 1536},
}
FAMILIES = ("albert", "bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert")
FAMILIES += ("deberta-v2", "mpnet", "xlnet")
WITH_DROPOUT = "roberta, attention dropout 0.1"


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=(*FAMILIES, WITH_DROPOUT), default=[*FAMILIES, WITH_DROPOUT])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--group", type=int, default=4, help="questions at a time for Hugging Face")
    options = parser.parse_args(arguments)
    items = draw(real_cache(), "train", options.questions)
    result = {"questions": options.questions, "group": options.group, "rounds": options.rounds, "shape": SHAPE}
    result["families"] = {}
    for family in options.families:
        result["families"][family] = measure(family, items, options)
        report("families", result)  # what was measured is kept, whatever comes
    return result


def measure(family: str, items: list[dict], options: argparse.Namespace) -> dict:
    """Seconds of a step of each side, and how many times as fast ours is."""
    print(family, flush=True)
    runs = sides(family, items, options)
    for run in runs.values():
        run()
    seconds = in_turn(runs, options.rounds)
    median = {side: statistics.median(seconds[side]) for side in seconds}
    ratios = {side: spread([b / a for a, b in zip(seconds[OURS], seconds[side], strict=True)]) for side in SIDES[1:]}
    return {"seconds": median, "ratios": ratios}


def config_of(family: str, vocabulary: int):
    """The configuration of a family in this shape."""
    from transformers import CONFIG_MAPPING

    name = family.split(",")[0]
    kind = CONFIG_MAPPING[name]
    known, default = kind().to_dict().keys() | kind.attribute_map.keys(), kind().to_dict()
    none = {name: 0.0 for name, value in default.items() if "dropout" in name and isinstance(value, float)}
    if family == WITH_DROPOUT:
        none["attention_probs_dropout_prob"] = 0.1
    sizes = {name: value for name, value in SHAPE.items() if name in known}
    return kind(**{"vocab_size": vocabulary} | sizes | none | OWN.get(name, {}))


def sides(family: str, items: list[dict], options: argparse.Namespace) -> dict:
    """Each side's step on the questions, to call."""
    from transformers import AutoModelForMultipleChoice

    from race.data import collate
    from race.encoder import takes_segments
    from race.memory import fit_memory
    from race_module import RaceModule

    vocabulary = max(30_522, *(int(ids.max()) + 1 for item in items for ids in item["input_ids"]))
    theirs = AutoModelForMultipleChoice.from_config(config_of(family, vocabulary)).train()
    module = RaceModule(config=config_of(family, vocabulary)).train()
    module.manual_backward, module.log = torch.Tensor.backward, lambda *_, **__: None
    fit_memory(module, torch.device("cpu"))
    one_segment = getattr(theirs.config, "type_vocab_size", 2) == 1
    items = [item | {"token_type_ids": [ids * (not one_segment) for ids in item["token_type_ids"]]} for item in items]
    # as in training: for a model that pads, the longest of a batch first
    own = sorted(items, key=lambda item: -max(map(len, item["input_ids"]))) if module.padded else items

    def ours() -> None:
        module.model_step(collate(own), "train")
        module.zero_grad()

    def padded(longest: int | None) -> None:
        for i in range(0, len(items), options.group):
            batch = pad(items[i : i + options.group], longest)
            if not takes_segments(theirs):
                batch.pop("token_type_ids")
            (theirs(**batch).loss * len(batch["labels"]) / len(items)).backward()
        theirs.zero_grad()

    return {
        OURS: lambda: timed(ours),
        SIDES[1]: lambda: timed(lambda: padded(512)),
        SIDES[2]: lambda: timed(lambda: padded(None)),
    }


if __name__ == "__main__":
    main()
