"""One training step: ours against Hugging Face's AlbertForMultipleChoice, padded to 512 or to the longest of a group.

The same questions, drawn at random; the same random weights; forward, loss, backward, and AdamW in the end. Hugging
Face's model is used as it comes: SDPA, `gelu_new` untouched, `--group` questions at a time, gradients added up. Each
model is in a process of its own. On CPU they take turns after every four questions, and matrix products are timed
in between; on a GPU (bf16 autocast on all sides) they take turns after whole steps, and warm-up comes first.
FLOPs are counted by `bench.common.forward_flops`, three times the forward pass.
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
    draw,
    forward_flops,
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
    parser.add_argument("--questions", type=int, help="questions in a step (16; on a GPU 32)")
    parser.add_argument("--rounds", type=int, help="steps of each side (1; on a GPU 20)")
    parser.add_argument("--group", type=int, help="questions at a time for Hugging Face (4; on a GPU 32)")
    parser.add_argument("--compile", action="store_true", help="compile our feed-forward with torch.compile")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.questions, options.rounds = options.questions or (32 if gpu else 16), options.rounds or (20 if gpu else 1)
    options.group = options.group or (32 if gpu else 4)
    cache = str(real_cache())
    seconds, products, peaks = measure(options, cache)
    result = summary(options, cache, seconds, products) | {"peak_mb": peaks}
    report("train_step" if options.shape == "base" else f"train_step-{options.shape}", result, options.device)
    return result


def measure(options: argparse.Namespace, cache: str) -> tuple[dict[str, list[list[float]]], list[float], dict]:
    """Seconds of each part of each step of each side, FLOP/s of the matrix products in between, and peak memory.

    A step's last part is the optimizer's.
    """
    part = options.questions if options.device == "cuda" else 4
    starts = range(0, options.questions, part)
    seconds: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    products = []
    with processes(PROCESSES, setup, cache, options) as call:
        run = {side: call[OURS if side == OURS else PROCESSES[1]] for side in SIDES}
        for side in SIDES:  # once for nothing: what is allocated stays, the optimizer makes its state
            run[side](backward, 0, 1, side)
            run[side](update)
        for number in range(-3 if options.device == "cuda" else 0, options.rounds):
            step: dict[str, list[float]] = {side: [] for side in SIDES}
            for first in starts:
                products += matrix_rate(options.device)
                for side in SIDES:
                    step[side].append(run[side](backward, first, first + part, side))
                    print(f"  step {number}, questions from {first}, {side}: {step[side][-1]:.2f} s", flush=True)
            for side in SIDES:
                step[side].append(run[side](update))
                if number >= 0:
                    seconds[side].append(step[side])
        return seconds, products, {side: call[side](peak_mb) for side in PROCESSES}


def summary(options: argparse.Namespace, cache: str, seconds: dict, products: list[float]) -> dict:
    """Questions a second, FLOP/s, share of the matrix-product rate (medians), and ratios of steps and of parts."""
    items = draw(cache, "train", options.questions)
    lengths = np.array([len(ids) for item in items for ids in item["input_ids"]])
    steps = {side: [sum(parts) for parts in seconds[side]] for side in SIDES}
    median = {side: statistics.median(steps[side]) for side in SIDES}
    sides, ratios = {}, {}
    for side in SIDES:
        flops = 3 * forward_flops(options.shape, lengths, last_layer_at_cls=side == OURS)
        sides[side] = {
            "questions_per_second": spread([options.questions / value for value in steps[side]]),
            "seconds_of_parts": seconds[side][:4],
            "model_gflops": flops / median[side] / 1e9,
            "share_of_matrix_product": flops / median[side] / statistics.median(products),
        }
        pairs = zip(np.concatenate(seconds[side]), np.concatenate(seconds[OURS]), strict=True)
        by_part = [float(theirs / mine) for theirs, mine in pairs]
        without_updates = [ratio for i, ratio in enumerate(by_part, 1) if i % len(seconds[side][0])]
        ratios[side] = {"of_steps": median[side] / median[OURS], "of_parts": spread(without_updates)}
    named = ("shape", "questions", "group", "rounds", "compile")
    return {name: getattr(options, name) for name in named} | {
        "precision": "bf16-mixed" if options.device == "cuda" else "32-true",
        "tokens_per_sequence": float(lengths.mean()),
        "matrix_product_gflops": {name: value / 1e9 for name, value in spread(products).items()},
        "sides": sides,
        "ratios": {side: ratios[side] for side in SIDES[1:]},
    }


# -------------------------------------------------------------------------------------------------- in a side's process


def setup(side: str, cache: str, options: argparse.Namespace) -> None:
    """Make a side's model, optimizer and questions; all sides start from the same weights."""
    from race.encoder import token_budget

    model = side_model(side, options.shape, cache)
    if side == OURS:
        model.manual_backward, model.log = torch.Tensor.backward, lambda *_, **__: None
        model.token_budget = token_budget(model.model, torch.device(options.device))
        if options.compile:
            compile_feed_forward(model)
    model.to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    STATE.update(model=model, optimizer=optimizer, options=options)
    STATE["items"] = draw(cache, "train", options.questions)


def compile_feed_forward(module) -> None:
    """Compile the part of a layer that sees no sequence bounds, for any number of tokens."""
    from race.encoder import albert_layers

    for layer in set(albert_layers(module.model.base_model)):
        layer.ff_chunk = torch.compile(layer.ff_chunk, dynamic=True)


def backward(first: int, last: int, side: str) -> float:
    """Seconds for forward and backward over questions first to last; gradients add up."""
    return timed(lambda: _backward(STATE["items"][first:last], side))


def _backward(items: list[dict], side: str) -> None:
    from race.data import collate

    model, options = STATE["model"], STATE["options"]
    gpu = options.device == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext():
        if side == OURS:
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
