"""The loader alone: batches of 32 questions a second, by number of workers, and its share of a training step.

The share is against the training step that `bench.train_step` measured last on the same kind of device. With workers
the loader runs beside the step, so its share is then an upper bound.
"""

import time

from bench import common

BATCH = 32


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = common.parser(__doc__, batches=300, rounds=3)
    parser.add_argument("--device", default="cpu", help="whose training step to compare with")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    cache, questions = common.real_cache(), {}

    def run(workers: int) -> float:
        seconds, questions[workers] = drain(cache, workers, options.batches)
        return seconds

    turns = {workers: (lambda workers=workers: run(workers)) for workers in options.workers}
    result, step = {"batch_size": BATCH, "workers": {}}, seconds_a_question(options.device)
    for workers, seconds in common.in_turn(turns, options.rounds).items():
        rates = common.spread([questions[workers] / value for value in seconds])
        result["workers"][str(workers)] = {
            "questions_per_second": rates,
            "batches_per_second": rates["median"] / BATCH,
            "share_of_training_step": None if step is None else 1 / rates["median"] / step,
        }
    return common.report("loader", result, options.device)


def drain(cache: str, workers: int, batches: int) -> tuple[float, int]:
    """(seconds, questions) of up to so many training batches; the first one, which starts the workers, is not timed."""
    data = common.RaceDataModule(cache, batch_size=BATCH, num_workers=workers)
    data.setup()
    loader = iter(data.train_dataloader())
    next(loader)
    start, questions = time.perf_counter(), 0
    for _, batch in zip(range(batches), loader, strict=False):
        questions += len(batch)
    return time.perf_counter() - start, questions


def seconds_a_question(device: str) -> float | None:
    """Our training step's seconds for a question, as measured last; None where it was not measured."""
    kept = common.kept_result("train_step", device)
    rate = kept and kept["sides"]["ours"].get("questions_per_second")
    return 1 / rate["median"] if rate else None


if __name__ == "__main__":
    main()
