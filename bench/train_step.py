"""One training step: ours against Hugging Face's AlbertForMultipleChoice, padded to 512 or to the longest of a group.

The same questions, drawn at random; the same random weights; forward, loss, backward, and AdamW in the end. Hugging
Face's model is used as it comes: SDPA, `gelu_new` untouched, `--group` questions at a time, gradients added up. Each
model is in a process of its own. On CPU they take turns after every four questions, and matrix products are timed
in between; on a GPU they take turns after whole steps: one for nothing, one on the clock, and then a side gives the
GPU's memory back, so that each has it to itself. A side that runs out of memory is a result, too.
All sides compute in the same precision; in bf16 on CPU, ours in fp32 takes turns with them.
FLOPs are counted by `bench.common.forward_flops`, three times the forward pass.
"""

import argparse

import numpy as np
import torch

from bench import common
from bench.common import OURS, SIDES

GROUPS = {"large": 8, "xlarge": 4}  # on a GPU: 32 padded questions take 145 GB of large
STATE: dict = {}  # of a side's own process


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = common.sides_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile our layers with torch.compile")
    options = parser.parse_args(arguments)
    cpu, gpu = {"questions": 16, "rounds": 1, "group": 4}, {"questions": 32, "rounds": 20}
    options = common.with_defaults(options, cpu, gpu | {"group": GROUPS.get(options.shape, 16)})
    cache = common.real_cache()
    parts, products, peaks = measure(options, cache)
    items = common.draw(cache, "train", options.questions)
    lengths = np.array([len(ids) for item in items for ids in item["input_ids"]])
    seconds = {side: [sum(step) for step in steps] for side, steps in parts.items()}
    result = common.comparison(options, lengths, seconds, products, passes=3)
    for side, ratio in result["ratios"].items():
        pairs = zip(*([part for step in parts[it] for part in step[:-1]] for it in (side, OURS)), strict=True)
        result["ratios"][side] = {"of_steps": ratio, "of_parts": common.spread([a / b for a, b in pairs])}
    result |= {"peak_mb": peaks, "compile": options.compile}
    return common.report(common.result_name("train_step", options), result, options.device)


def measure(options: argparse.Namespace, cache: str) -> tuple[dict[str, list[list[float]]], list[float], dict]:
    """Seconds of each part of each step of each side, FLOP/s of the matrix products in between, and peak memory.

    A step's last part is the optimizer's. A side that ran out of memory is left out.
    """
    gpu = options.device == "cuda"
    part = options.questions if gpu else 4
    with common.processes(options, setup, cache) as call:
        seconds: dict[str, list[list[float]]] = {side: [] for side in call}
        products: list[float] = []
        for side in call:  # once for nothing: what is allocated stays, the optimizer makes its state
            call[side](backward, 0, 1, side)
            call[side](update)
        for number in range(-1 if gpu else 0, options.rounds):
            step: dict[str, list[float]] = {side: [] for side in seconds}
            for first in range(0, options.questions, part):
                products += common.matrix_rate(options.device, options.precision)
                for side in list(seconds):
                    taken = call[side](backward, first, first + part, side)
                    if taken is None:
                        del seconds[side]
                    else:
                        step[side].append(taken)
                    outcome = "out of memory" if taken is None else f"{taken:.2f} s"
                    print(f"  step {number}, questions from {first}, {side}: {outcome}", flush=True)
            for side in seconds:
                step[side].append(call[side](update))
                if number >= 0:
                    seconds[side].append(step[side])
        return seconds, products, {side: call[side](common.peak_mb) for side in seconds if side != SIDES[2]}


# -------------------------------------------------------------------------------------------------- in a side's process


def setup(side: str, cache: str, options: argparse.Namespace) -> None:
    """Make a side's model, optimizer and questions; all sides start from the same weights."""
    model = common.side_model(side, options, cache).train()
    if options.compile and common.is_ours(side):
        common.compile_layers(model.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    STATE.update(model=model, optimizer=optimizer, options=options)
    STATE["items"] = common.draw(cache, "train", options.questions)


def backward(first: int, last: int, side: str) -> float | None:
    """Seconds for forward and backward over questions first to last; gradients add up. None: out of memory."""
    items, gpu = STATE["items"][first:last], STATE["options"].device == "cuda"
    try:
        if gpu:
            _backward(items, side)
            STATE["optimizer"].zero_grad()
        return common.timed(lambda: _backward(items, side))
    except (torch.OutOfMemoryError, common.RaceError):  # RaceModule says so where not even one question fits
        STATE["optimizer"].zero_grad()
        return None
    finally:
        if gpu:
            torch.cuda.empty_cache()


def _backward(items: list[dict], side: str) -> None:
    model, options = STATE["model"], STATE["options"]
    with common.side_autocast(side, options):
        if common.is_ours(side):
            model.model_step(common.collate(items).to(options.device), "train")
            return
        for i in range(0, len(items), options.group):
            batch = common.pad(items[i : i + options.group], 512 if side == SIDES[1] else None, options.device)
            (model(**batch).loss * len(batch["labels"]) / len(items)).backward()


def update() -> float:
    """Seconds for the optimizer's step."""
    return common.timed(lambda: (STATE["optimizer"].step(), STATE["optimizer"].zero_grad()))


if __name__ == "__main__":
    main()
