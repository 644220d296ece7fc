"""How cost grows: a cache of 1/8, 1/4, 1/2 and 1 of the data; a step of more and more tokens; two processes for one.

Cache: seconds and peak memory, each in a fresh process. Step: forward and backward of one packed part of so many
tokens; per token it should stay level. Two processes (gloo, one thread each, gradients averaged after the last part,
nothing overlapped) against one process of one thread, on the same questions of nearly equal length.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.cache import write_files
from bench.common import (
    ROOT,
    SHAPES,
    albert_config,
    default_precision,
    peak_mb,
    processes,
    real_cache,
    report,
    timed,
)

STATE: dict = {}  # of a worker process


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the step; the rest is CPU's")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--passages", type=int, default=12000, help="passages that make up the whole for the cache")
    parser.add_argument("--tokens", type=int, nargs="+", help="token counts (512 … 4096; on a GPU … 65536)")
    parser.add_argument("--questions", type=int, default=2, help="questions for the two processes")
    options = parser.parse_args(arguments)
    cache = str(real_cache())
    result = {"shape": options.shape, "cache": cache_sizes(options.passages)}
    result["step"] = step_sizes(cache, options.shape, options.device, options.tokens)
    result["processes"] = process_counts(cache, options)
    report("scaling", result, options.device)
    return result


def cache_sizes(passages: int) -> list[dict]:
    """Seconds, questions and peak memory of caches of an eighth, a quarter, half and all of the passages."""
    rows = []
    for part in (8, 4, 2, 1):
        with tempfile.TemporaryDirectory() as folder:
            questions = write_files(Path(folder), passages // part)
            command = [sys.executable, "-m", "bench.cache", "--side", "ours", "--files", folder]
            output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        made = json.loads(output.splitlines()[-1])
        rows.append({"part": f"1/{part}", "questions": questions, "seconds": made["seconds"]})
        rows[-1] |= {"questions_per_second": questions / made["seconds"], "peak_mb": made["peak_mb"]}
        print(f"  cache, {rows[-1]}", flush=True)
    return rows


def step_sizes(cache: str, shape: str, device: str, tokens: list[int] | None = None) -> list[dict]:
    """Seconds of forward and backward, and peak memory so far, by number of tokens in one part."""
    rows = []
    with processes(["one"], setup, cache, shape, device) as call:
        call["one"](step, [128] * 4)
        for count in tokens or [512 << i for i in range(8 if device == "cuda" else 4)]:
            lengths = [min(512, count // 4)] * (count // min(512, count // 4))
            taken = [call["one"](step, lengths) for _ in range(2)]
            if None in taken:
                print(f"  step, {sum(lengths)} tokens: out of memory", flush=True)
                break
            seconds = statistics.median(taken)
            rows.append({"tokens": sum(lengths), "seconds": seconds, "ms_per_token": 1e3 * seconds / sum(lengths)})
            rows[-1]["peak_mb"] = call["one"](peak_mb)
            print(f"  step, {rows[-1]}", flush=True)
    return rows


def process_counts(cache: str, options: argparse.Namespace) -> dict:
    """Seconds of a step on the same questions with one process, and with two that average their gradients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lengths = near_median(cache, options.questions)
    with processes(["one"], setup, cache, options.shape, "cpu", 1) as call:
        call["one"](step, lengths[:1])
        alone = call["one"](step, lengths)
    context, seconds = multiprocessing.get_context("spawn"), []
    queue = context.Queue()
    share = [lengths[rank::2] for rank in range(2)]
    workers = [
        context.Process(target=data_parallel, args=(rank, port, cache, options.shape, share[rank], queue))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"a data-parallel process ended with {[worker.exitcode for worker in workers]}")
    seconds = [queue.get() for _ in workers]
    total, exchange = max(seconds)
    result = {"questions": len(lengths), "one_process_seconds": alone, "two_processes_seconds": total}
    result |= {"of_which_exchange_seconds": exchange, "speed_up": alone / total}
    print(f"  processes, {result}", flush=True)
    return result


def near_median(cache: str, questions: int) -> list[list[int]]:
    """The lengths of the four sequences of questions of nearly the median number of tokens, alike as they come."""
    from race.data.module import RaceDataset

    lengths = RaceDataset(cache, "train").lengths()
    order = np.argsort(lengths.sum(1), kind="stable")
    middle = len(order) // 2
    return lengths[order[middle : middle + questions]].tolist()


# -------------------------------------------------------------------------------------------------- in other processes


def setup(name: str, cache: str, shape: str, device: str, threads: int | None = None) -> None:
    """Make a model with random weights in this process."""
    from race.memory import fit_memory
    from race_module import RaceModule

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = RaceModule(config=albert_config(shape, Path(cache))).to(device).train()
    module.manual_backward, module.log = torch.Tensor.backward, lambda *_, **__: None
    fit_memory(module, torch.device(device), half=device == "cuda")
    STATE.update(module=module, device=device, budget=module.token_budget)


def step(lengths: list) -> float | None:
    """Seconds of forward and backward on random tokens: flat lengths go through at once, questions by budget.

    None: flat lengths were too many for the GPU's memory.
    """
    from race import RaceError
    from race.data import collate
    from race.train.precision import autocast

    flat = isinstance(lengths[0], int)
    questions = np.reshape(lengths, (-1, 4)).tolist() if flat else lengths
    rng, module = np.random.default_rng(0), STATE["module"]
    items = [
        {
            "input_ids": [rng.integers(5, module.model.config.vocab_size, length) for length in question],
            "token_type_ids": [np.repeat([0, 1], [length - 32, 32]) for length in question],
            "label": 0,
        }
        for question in questions
    ]
    batch = collate(items).to(STATE["device"])
    module.token_budget = None if flat else STATE["budget"]
    module.zero_grad()
    try:
        with autocast(STATE["device"], default_precision(STATE["device"])):
            seconds = timed(lambda: module.model_step(batch, "train"))
    except RaceError:  # not even a question fits
        return None
    return seconds if module.token_budget == (None if flat else STATE["budget"]) else None  # else taken in parts


def data_parallel(rank: int, port: int, cache: str, shape: str, lengths: list, queue) -> None:
    """One of two processes: puts (seconds of a step with the exchange of gradients, of the exchange alone)."""
    import torch.distributed as distributed

    setup("", cache, shape, "cpu", 1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def exchange() -> None:
        gradients = torch.cat([parameter.grad.flatten() for parameter in STATE["module"].parameters()])
        distributed.all_reduce(gradients)

    step(lengths[:1])
    exchange()
    distributed.barrier()
    part = []
    total = timed(lambda: (step(lengths), part.append(timed(exchange))))
    queue.put((total, part[0]))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
