"""Scoring: ours against Hugging Face's AlbertForMultipleChoice in inference mode, padded to 512 or a group's longest.

Ours is what scoring does: the loader's order, longest questions first, packed. The reference takes the same questions
as they come, `--group` at a time: neighbours of the split, most of which share their article, as it would meet them in
a whole split. Random weights, forward pass only; sides in processes of their own, in turn.
All sides compute in the same precision; in bf16 on CPU, ours in fp32 takes turns with them.

`--checkpoint FILE` measures no speed: it compares a checkpoint's answers in bf16 with those in fp32. (With random
weights the options of a question are so close that rounding decides.)
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from bench import common
from bench.common import OURS, OURS_FP32, SIDES

STATE: dict = {}  # of a side's own process


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = common.sides_parser(__doc__)
    parser.add_argument("--checkpoint", help="compare this checkpoint's answers in bf16 and in fp32, and nothing else")
    cpu, gpu = {"questions": 24, "rounds": 2, "group": 4}, {"questions": 1024, "rounds": 2, "group": 32}
    options = common.with_defaults(parser.parse_args(arguments), cpu, gpu)
    cache, products = common.real_cache(), []
    if options.checkpoint:
        return answers(options, cache)
    with common.processes(options, setup, cache) as call:
        run = {side: (lambda side=side: call[side](score, side)) for side in call}
        if options.device == "cuda":
            common.in_turn(run, 1)
        turns = {"matrix": lambda: products.extend(common.matrix_rate(options.device, options.precision)) or 0.0}
        seconds = common.in_turn(turns | run, options.rounds)
        peaks = {side: call[side](common.peak_mb) for side in call if side != SIDES[2]}
    del seconds["matrix"]
    lengths = _data(cache, options).dataset("validation").lengths().ravel()
    result = common.comparison(options, lengths, seconds, products, passes=1) | {"peak_mb": peaks}
    return common.report(common.result_name("evaluate", options), result, options.device)


def answers(options: argparse.Namespace, cache: str) -> dict:
    """How many answers bf16 changes, its largest effect on a probability, and how far an answer leads in fp32."""
    options.precision = "bf16-mixed"
    module = common.RaceModule.load_from_checkpoint(options.checkpoint, options.device).eval()
    common.fit_memory(module, module.device)
    data = _data(cache, options)
    half, full = (np.array(_ours(module, data, side, options)) for side in (OURS, OURS_FP32))
    best = np.sort(full, 1)
    result = {
        "checkpoint": Path(options.checkpoint).name,
        "questions": len(full),
        "share_that_differ": float((half.argmax(1) != full.argmax(1)).mean()),
        "largest_difference": float(np.abs(half - full).max()),
        "median_lead": float(np.median(best[:, -1] - best[:, -2])),
    }
    return common.report("answers", result, options.device)


def _data(cache: str, options: argparse.Namespace):
    data = common.RaceDataModule(cache, batch_size=128 if options.device == "cuda" else 32, num_workers=0)
    rows = common.drawn(data.dataset("validation"), options.questions, neighbours=options.group)
    data.val_dataset = common.RaceDataset(cache, "validation", rows=rows)
    return data


# -------------------------------------------------------------------------------------------------- in a side's process


def setup(side: str, cache: str, options: argparse.Namespace) -> None:
    """Make a side's model, of the same weights on all sides."""
    STATE.update(model=common.side_model(side, options, cache).eval(), options=options, data=_data(cache, options))


def score(side: str) -> float:
    """Seconds to score the questions."""
    run = _ours if common.is_ours(side) else _reference
    return common.timed(lambda: run(STATE["model"], STATE["data"], side, STATE["options"]))


@torch.inference_mode()
def _ours(model, data, side: str, options: argparse.Namespace) -> list:
    probabilities = []
    with common.side_autocast(side, options):
        for batch in data.ordered_loader("validation"):
            probabilities += common.in_parts(
                model, batch.to(model.device), lambda part, _: model(part).double().softmax(1)
            )
        return torch.cat(probabilities).tolist()


@torch.inference_mode()
def _reference(model, data, side: str, options: argparse.Namespace) -> list:
    dataset, probabilities = data.dataset("validation"), []
    with common.side_autocast(side, options):
        for i in range(0, len(dataset), options.group):
            items = [dataset[j] for j in range(i, min(i + options.group, len(dataset)))]
            batch = common.pad(items, 512 if side == SIDES[1] else None, options.device)
            batch.pop("labels")
            probabilities.append(model(**batch).logits.double().softmax(1))
        return torch.cat(probabilities).tolist()


if __name__ == "__main__":
    main()
