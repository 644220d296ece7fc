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
import statistics

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
    draw,
    forward_flops,
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

GROUPS = {"tiny": 32, "base": 16, "large": 8, "xlarge": 4}  # on a GPU: 32 padded questions take 145 GB of large
STATE: dict = {}  # of a side's own process


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--questions", type=int, help="questions in a step (16; on a GPU 32)")
    parser.add_argument("--rounds", type=int, help="steps of each side (1; on a GPU 20)")
    parser.add_argument("--group", type=int, help="questions at a time for Hugging Face (4; on a GPU by shape)")
    parser.add_argument("--compile", action="store_true", help="compile our layers with torch.compile")
    add_precision(parser)
    options = parser.parse_args(arguments)
    options.precision = options.precision or default_precision(options.device)
    gpu = options.device == "cuda"
    options.questions, options.rounds = options.questions or (32 if gpu else 16), options.rounds or (20 if gpu else 1)
    options.group = options.group or (GROUPS[options.shape] if gpu else 4)
    cache = str(real_cache())
    seconds, products, peaks = measure(options, cache)
    result = summary(options, cache, seconds, products) | {"peak_mb": peaks}
    report(result_name("train_step", options), result, options.device)
    return result


def measure(options: argparse.Namespace, cache: str) -> tuple[dict[str, list[list[float]]], list[float], dict]:
    """Seconds of each part of each step of each side, FLOP/s of the matrix products in between, and peak memory.

    A step's last part is the optimizer's. A side that ran out of memory is left out.
    """
    part = options.questions if options.device == "cuda" else 4
    starts = range(0, options.questions, part)
    sides, products = list(sides_of(options)), []
    seconds: dict[str, list[list[float]]] = {side: [] for side in sides}
    with processes(list(dict.fromkeys(map(process_of, sides))), setup, cache, options) as call:
        run = {side: call[process_of(side)] for side in sides}
        for side in sides:  # once for nothing: what is allocated stays, the optimizer makes its state
            run[side](backward, 0, 1, side)
            run[side](update)
        for number in range(-1 if options.device == "cuda" else 0, options.rounds):
            step: dict[str, list[float]] = {side: [] for side in sides}
            for first in starts:
                products += matrix_rate(options.device, options.precision)
                for side in list(sides):
                    taken = run[side](backward, first, first + part, side)
                    if taken is None:
                        sides.remove(side)
                        del seconds[side]
                    else:
                        step[side].append(taken)
                    outcome = "out of memory" if taken is None else f"{taken:.2f} s"
                    print(f"  step {number}, questions from {first}, {side}: {outcome}", flush=True)
            for side in sides:
                step[side].append(run[side](update))
                if number >= 0:
                    seconds[side].append(step[side])
        return seconds, products, {side: call[side](peak_mb) for side in call if side in sides}


def summary(options: argparse.Namespace, cache: str, seconds: dict, products: list[float]) -> dict:
    """Questions a second, FLOP/s, share of the matrix-product rate (medians), and ratios of steps and of parts."""
    items = draw(cache, "train", options.questions)
    lengths = np.array([len(ids) for item in items for ids in item["input_ids"]])
    steps = {side: [sum(parts) for parts in seconds[side]] for side in seconds}
    median = {side: statistics.median(steps[side]) for side in seconds}
    sides, ratios = {side: {"out_of_memory": True} for side in sides_of(options)}, {}
    for side in seconds:
        flops = 3 * forward_flops(options.shape, lengths, last_layer_at_cls=side in (OURS, OURS_FP32))
        sides[side] = {
            "questions_per_second": spread([options.questions / value for value in steps[side]]),
            "seconds_of_parts": seconds[side][:4],
            "model_gflops": flops / median[side] / 1e9,
        }
        if side != OURS_FP32:  # the matrix products are those of the other precision
            sides[side]["share_of_matrix_product"] = flops / median[side] / statistics.median(products)
        if side == OURS or OURS not in seconds:
            continue
        pairs = zip(np.concatenate(seconds[side]), np.concatenate(seconds[OURS]), strict=True)
        by_part = [float(theirs / mine) for theirs, mine in pairs]
        without_updates = [ratio for i, ratio in enumerate(by_part, 1) if i % len(seconds[side][0])]
        ratios[side] = {"of_steps": median[side] / median[OURS], "of_parts": spread(without_updates)}
    named = ("shape", "precision", "questions", "group", "rounds", "compile")
    return {name: getattr(options, name) for name in named} | {
        "tokens_per_sequence": float(lengths.mean()),
        "matrix_product_gflops": {name: value / 1e9 for name, value in spread(products).items()},
        "sides": sides,
        "ratios": ratios,
    }


# -------------------------------------------------------------------------------------------------- in a side's process


def setup(side: str, cache: str, options: argparse.Namespace) -> None:
    """Make a side's model, optimizer and questions; all sides start from the same weights."""
    from race.encoder import compile_layers
    from race.memory import fit_memory

    model = side_model(side, options.shape, cache)
    if side in (OURS, OURS_FP32):
        model.manual_backward, model.log = torch.Tensor.backward, lambda *_, **__: None
        fit_memory(model, torch.device(options.device), half=side == OURS and options.precision != "32-true")
        if options.compile:
            compile_layers(model.model)
    model.to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    STATE.update(model=model, optimizer=optimizer, options=options)
    STATE["items"] = draw(cache, "train", options.questions)


def backward(first: int, last: int, side: str) -> float | None:
    """Seconds for forward and backward over questions first to last; gradients add up. None: out of memory."""
    seconds = _seconds(STATE["items"][first:last], side)
    if STATE["options"].device == "cuda":
        torch.cuda.empty_cache()
    return seconds


def _seconds(items: list[dict], side: str) -> float | None:
    from race import RaceError

    try:
        if STATE["options"].device == "cuda":
            _backward(items, side)
            STATE["optimizer"].zero_grad()
        return timed(lambda: _backward(items, side))
    except (torch.OutOfMemoryError, RaceError):  # RaceModule says so where not even one question fits
        STATE["optimizer"].zero_grad()
        return None


def _backward(items: list[dict], side: str) -> None:
    from race.data import collate

    model, options = STATE["model"], STATE["options"]
    with autocast(side, options):
        if side in (OURS, OURS_FP32):
            model.model_step(collate(items).to(options.device), "train")
            return
        for i in range(0, len(items), options.group):
            batch = pad(items[i : i + options.group], 512 if side == SIDES[1] else None)
            batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
            (model(**batch).loss * len(batch["labels"]) / len(items)).backward()


def update() -> float:
    """Seconds for the optimizer's step."""
    return timed(_update)


def _update() -> None:
    STATE["optimizer"].step()
    STATE["optimizer"].zero_grad()


if __name__ == "__main__":
    main()
