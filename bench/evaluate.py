"""Scoring: ours against Hugging Face's AlbertForMultipleChoice in inference mode, padded to 512 or a group's longest.

Ours is what `race.score.predict` does: the loader's order, longest questions first, packed. The reference takes
the same questions as they come, `--group` at a time: neighbours of the split, most of which share their article, as it
would meet them in a whole split. Random weights, forward pass only; sides in processes of their own, in turn.
All sides compute in the same precision; in bf16 on CPU, ours in fp32 takes turns with them.

`--checkpoint FILE` measures no speed: it compares a checkpoint's answers in bf16 with those in fp32. (With random
weights the options of a question are so close that rounding decides.)
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

from bench.common import (
    OURS,
    OURS_FP32,
    SHAPES,
    SIDES,
    add_precision,
    autocast,
    default_precision,
    drawn,
    forward_flops,
    in_turn,
    matrix_rate,
    pad,
    peak_mb,
    process_of,
    processes,
    real_cache,
    report,
    result_name,
    side_model,
    sides_of,
    spread,
    timed,
)

STATE: dict = {}  # of a side's own process


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--questions", type=int, help="questions to score (24; on a GPU 1,024)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--group", type=int, help="questions at a time for Hugging Face (4; on a GPU 32)")
    parser.add_argument("--checkpoint", help="compare this checkpoint's answers in bf16 and in fp32, and nothing else")
    add_precision(parser)
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.precision = options.precision or default_precision(options.device)
    options.questions, options.group = options.questions or (1024 if gpu else 24), options.group or (32 if gpu else 4)
    cache = str(real_cache())
    if options.checkpoint:
        return answers(options, cache)
    sides, products = sides_of(options), []
    with processes(list(dict.fromkeys(map(process_of, sides))), setup, cache, options) as call:
        run = {side: (lambda side=side: call[process_of(side)](score, side)) for side in sides}
        if gpu:
            in_turn(run, 1)
        turns = {"matrix product": lambda: products.extend(matrix_rate(options.device, options.precision)) or 0.0}
        seconds = in_turn(turns | run, options.rounds)
        peaks = {side: call[side](peak_mb) for side in call}
    lengths = _data(cache, options).dataset("validation").lengths().ravel()
    median = {side: statistics.median(seconds[side]) for side in sides}
    result = {name: getattr(options, name) for name in ("shape", "precision", "questions", "group", "rounds")}
    result["tokens_per_sequence"] = float(np.mean(lengths))
    result["matrix_product_gflops"] = {name: value / 1e9 for name, value in spread(products).items()}
    result["sides"] = {}
    for side in sides:
        result["sides"][side] = {"questions_per_second": spread([options.questions / value for value in seconds[side]])}
        if side != OURS_FP32:  # the matrix products are those of the other precision
            rate = forward_flops(options.shape, lengths, last_layer_at_cls=side == OURS) / median[side]
            result["sides"][side]["share_of_matrix_product"] = rate / statistics.median(products)
    result["peak_mb"] = peaks
    result["ratios"] = {side: median[side] / median[OURS] for side in sides[1:]}
    report(result_name("evaluate", options), result, options.device)
    return result


def answers(options: argparse.Namespace, cache: str) -> dict:
    """How many answers bf16 changes, its largest effect on a probability, and how far an answer leads in fp32."""
    from race.memory import fit_memory
    from race_module import RaceModule

    options.precision = "bf16-mixed"
    module, data = RaceModule.load_from_checkpoint(options.checkpoint, options.device).eval(), _data(cache, options)
    fit_memory(module, module.device)
    half, full = (np.array(_ours(module, data, side, options)) for side in (OURS, OURS_FP32))
    best = np.sort(full, 1)
    result = {
        "checkpoint": Path(options.checkpoint).name,
        "questions": len(full),
        "share_that_differ": float((half.argmax(1) != full.argmax(1)).mean()),
        "largest_difference": float(np.abs(half - full).max()),
        "median_lead": float(np.median(best[:, -1] - best[:, -2])),
    }
    report("answers", result, options.device)
    return result


def _data(cache: str, options: argparse.Namespace):
    from race.data import RaceDataModule
    from race.data.module import RaceDataset

    data = RaceDataModule(cache, batch_size=128 if options.device == "cuda" else 32, num_workers=0)
    rows = drawn(data.dataset("validation"), options.questions, neighbours=options.group)
    data.val_dataset = RaceDataset(cache, "validation", rows=rows)
    return data


def setup(side: str, cache: str, options: argparse.Namespace) -> None:
    """Make a side's model, of the same weights on all sides."""
    from race.memory import fit_memory

    model, device = side_model(side, options.shape, cache), torch.device(options.device)
    if side in (OURS, OURS_FP32):
        fit_memory(model, device, half=side == OURS and options.precision != "32-true")
    STATE.update(model=model.to(device).eval(), options=options, data=_data(cache, options))


def score(side: str) -> float:
    """Seconds to score the questions."""
    if side in (OURS, OURS_FP32):
        return timed(lambda: _ours(STATE["model"], STATE["data"], side, STATE["options"]))
    return timed(lambda: _reference(side))


@torch.inference_mode()
def _ours(model, data, side: str, options: argparse.Namespace) -> list:
    probabilities = []
    with autocast(side, options):
        for batch in data.ordered_loader("validation"):
            for part in batch.to(model.device).micro_batches(model.token_budget):
                probabilities.append(model(part).double().softmax(1))
        return torch.cat(probabilities).tolist()


@torch.inference_mode()
def _reference(side: str) -> list:
    options, dataset, probabilities = STATE["options"], STATE["data"].dataset("validation"), []
    with autocast(side, options):
        for i in range(0, len(dataset), options.group):
            items = [dataset[j] for j in range(i, min(i + options.group, len(dataset)))]
            batch = pad(items, 512 if side == SIDES[1] else None)
            batch = {name: tensor.to(options.device) for name, tensor in batch.items() if name != "labels"}
            probabilities.append(STATE["model"](**batch).logits.double().softmax(1))
        return torch.cat(probabilities).tolist()


if __name__ == "__main__":
    main()
