"""A training step of each family of encoders: ours against Hugging Face's model, padded to 512 or to a group's longest.

Random weights of half a base shape (6 layers of 384 places, 12 heads), the same questions for all, drawn at random;
forward, loss and backward in float32 without dropout. Hugging Face's model takes `--group` questions at a time. The
sides take turns; the first turn is not counted.
"""

import argparse
import statistics

import torch

from bench import common
from bench.common import OURS, SIDES

SHAPE = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
GATED = {"modernbert": {"intermediate_size": 1024}}  # as many weights as 1,536 of others
FAMILIES = ("albert", "bert", "roberta", "electra", "distilbert", "modernbert", "deberta-v2", "mpnet")
VOCABULARY = 30_522


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = common.parser(__doc__, questions=16, rounds=1, group=4)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    options = parser.parse_args(arguments)
    items = common.draw(common.real_cache(), "train", options.questions)
    result = {"questions": options.questions, "group": options.group, "rounds": options.rounds, "shape": SHAPE}
    result["families"] = {}
    for family in options.families:
        result["families"][family] = measure(family, items, options)
        common.report("families", result)  # what was measured is kept, whatever comes
    return result


def measure(family: str, items: list[dict], options: argparse.Namespace) -> dict:
    """Seconds of a step of each side, and how many times as fast ours is."""
    print(family, flush=True)
    runs = sides(family, items, options)
    for run in runs.values():
        run()
    seconds = common.in_turn(runs, options.rounds)
    median = {side: statistics.median(seconds[side]) for side in seconds}
    ratios = {side: [b / a for a, b in zip(seconds[OURS], seconds[side], strict=True)] for side in SIDES[1:]}
    return {"seconds": median, "ratios": {side: common.spread(values) for side, values in ratios.items()}}


def sides(family: str, items: list[dict], options: argparse.Namespace) -> dict:
    """Each side's step on the questions, to call."""
    from transformers import AutoModelForMultipleChoice

    torch.manual_seed(0)
    config = common.config(family, VOCABULARY, *SHAPE.values(), **GATED.get(family, {}))
    theirs, module = AutoModelForMultipleChoice.from_config(config).train(), common.our_module(config, "cpu").train()
    # as in training: for a model that pads, the longest of a batch first
    own = sorted(items, key=lambda item: -max(map(len, item["input_ids"]))) if module.padded else items

    def ours() -> None:
        module.model_step(common.collate(own), "train")
        module.zero_grad()

    def padded(longest: int | None) -> None:
        for i in range(0, len(items), options.group):
            batch = common.pad(items[i : i + options.group], longest)
            if not common.takes_segments(theirs):
                batch.pop("token_type_ids")
            (theirs(**batch).loss * len(batch["labels"]) / len(items)).backward()
        theirs.zero_grad()

    runs = {OURS: ours, SIDES[1]: lambda: padded(512), SIDES[2]: lambda: padded(None)}
    return {side: (lambda run=run: common.timed(run)) for side, run in runs.items()}


if __name__ == "__main__":
    main()
