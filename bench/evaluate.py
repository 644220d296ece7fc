"""Scoring: ours against Hugging Face's AlbertForMultipleChoice in inference mode, padded to 512 or a group's longest.

Ours is what `race.score.predict` does: the loader's order, longest questions first, packed. The reference takes
the same questions as they come, `--group` at a time: neighbours of the split, most of which share their article, as it
would meet them in a whole split. Random weights, forward pass only; sides in processes of their own, in turn.
"""

import argparse
import contextlib
import statistics

import numpy as np
import torch

from bench.common import (
    OURS,
    PROCESSES,
    SHAPES,
    SIDES,
    drawn,
    forward_flops,
    in_turn,
    matrix_rate,
    pad,
    peak_mb,
    processes,
    real_cache,
    report,
    side_model,
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
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.questions, options.group = options.questions or (1024 if gpu else 24), options.group or (32 if gpu else 4)
    cache = str(real_cache())
    products = []
    with processes(PROCESSES, setup, cache, options) as call:
        run = {side: (lambda side=side: call[OURS if side == OURS else PROCESSES[1]](score, side)) for side in SIDES}
        if gpu:
            in_turn(run, 1)
        turns = {"matrix product": lambda: products.extend(matrix_rate(options.device)) or 0.0}
        seconds = in_turn(turns | run, options.rounds)
        peaks = {side: call[side](peak_mb) for side in PROCESSES}
    lengths = _data(cache, options).dataset("validation").lengths().ravel()
    median = {side: statistics.median(seconds[side]) for side in SIDES}
    result = {name: getattr(options, name) for name in ("shape", "questions", "group", "rounds")}
    result |= {"precision": "bf16-mixed" if gpu else "32-true", "tokens_per_sequence": float(np.mean(lengths))}
    result["matrix_product_gflops"] = {name: value / 1e9 for name, value in spread(products).items()}
    result["sides"] = {}
    for side in SIDES:
        rate = forward_flops(options.shape, lengths, last_layer_at_cls=side == OURS) / median[side]
        result["sides"][side] = {
            "questions_per_second": spread([options.questions / value for value in seconds[side]]),
            "share_of_matrix_product": rate / statistics.median(products),
        }
    result["peak_mb"] = peaks
    result["ratios"] = {side: median[side] / median[OURS] for side in SIDES[1:]}
    report("evaluate" if options.shape == "base" else f"evaluate-{options.shape}", result, options.device)
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
    model = side_model(side, options.shape, cache)
    STATE.update(model=model.to(options.device).eval(), options=options, data=_data(cache, options))


def score(side: str) -> float:
    """Seconds to score the questions."""
    return timed(_ours if side == OURS else lambda: _reference(side))


def _inference():
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode())
    if STATE["options"].device == "cuda":
        stack.enter_context(torch.autocast("cuda", torch.bfloat16))
    return stack


def _ours() -> list:
    from race.encoder import token_budget

    model, device = STATE["model"], torch.device(STATE["options"].device)
    budget, probabilities = token_budget(model.model, device), []
    with _inference():
        for batch in STATE["data"].ordered_loader("validation"):
            for part in batch.to(device).micro_batches(budget):
                probabilities.append(model(part).double().softmax(1))
        return torch.cat(probabilities).tolist()


def _reference(side: str) -> list:
    options, dataset, probabilities = STATE["options"], STATE["data"].dataset("validation"), []
    with _inference():
        for i in range(0, len(dataset), options.group):
            items = [dataset[j] for j in range(i, min(i + options.group, len(dataset)))]
            batch = pad(items, 512 if side == SIDES[1] else None)
            batch = {name: tensor.to(options.device) for name, tensor in batch.items() if name != "labels"}
            probabilities.append(STATE["model"](**batch).logits.double().softmax(1))
        return torch.cat(probabilities).tolist()


if __name__ == "__main__":
    main()
