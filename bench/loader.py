"""The loader alone: batches of 32 questions a second, by number of workers, and its share of a training step.

The share is against the training step that `bench.train_step` measured last on the same kind of device. With workers
the loader runs beside the step, so its share is then an upper bound.
"""

import argparse
import json
import time

from bench.common import RESULTS, in_turn, real_cache, report, spread

BATCH = 32


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose training step to compare with")
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    cache = real_cache()
    counted: dict[str, int] = {}

    def sides(workers: int) -> float:
        seconds, counted[str(workers)] = drain(cache, workers, options.batches)
        return seconds

    turns = {str(workers): (lambda workers=workers: sides(workers)) for workers in options.workers}
    result, step = {"batch_size": BATCH, "workers": {}}, seconds_a_question(options.device)
    for workers, seconds in in_turn(turns, options.rounds).items():
        rates = spread([counted[workers] / value for value in seconds])
        result["workers"][workers] = {
            "questions_per_second": rates,
            "batches_per_second": rates["median"] / BATCH,
            "share_of_training_step": None if step is None else 1 / rates["median"] / step,
        }
    report("loader", result, options.device)
    return result


def drain(cache, workers: int, batches: int) -> tuple[float, int]:
    """(seconds, questions) of up to so many training batches; the first one, which starts the workers, is not timed."""
    from race.data import RaceDataModule

    data = RaceDataModule(cache, batch_size=BATCH, num_workers=workers)
    data.setup()
    loader = iter(data.train_dataloader())
    next(loader)
    start, questions = time.perf_counter(), 0
    for _, batch in zip(range(batches), loader, strict=False):
        questions += len(batch)
    return time.perf_counter() - start, questions


def seconds_a_question(device: str) -> float | None:
    """Our training step's seconds for a question, as measured last; None where it was not measured."""
    path = RESULTS / f"train_step{'-cuda' if device == 'cuda' else ''}.json"
    if not path.exists():
        return None
    rate = json.loads(path.read_text())["sides"]["ours"].get("questions_per_second")
    return None if rate is None else 1 / rate["median"]


if __name__ == "__main__":
    main()
