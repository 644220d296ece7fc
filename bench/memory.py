"""The memory of training steps on a CUDA device of a chosen size.

A case is a model's shape, a precision, and how long the questions are; it runs 45 steps of 32 questions of random
tokens as Lightning runs them in a stage, and adds a line to bench/results/memory.jsonl: how many micro-batches a step
took, what was allocated at most, what was reserved after 40 steps, and whether the memory was enough.

    python -m bench.memory --cards 8 16 24 40 80

starts each case for each card size in GB in a process of its own, with Python or with the command in BENCH_LAUNCHER: in
it, {gb} and {capability} stand for the card that it should choose. A case that has its line is not run again.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys

import numpy as np
import torch

from bench import common

CASES = [(shape, precision) for shape in ("base", "bert-base") for precision in ("bf16-mixed", "16-mixed", "32-true")]
CASES[3:3] = [("large", "bf16-mixed"), ("xlarge", "bf16-mixed")]
CAPABILITY = {"bf16-mixed": "8.0", "16-mixed": "7.5", "32-true": "8.0"}  # of the card, by precision
LENGTHS = ("race", "middle", "skewed")
QUESTIONS, STEPS = 32, 45
ALMOST_ALL = 40  # steps after which the reserved memory is noted


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", default=[], metavar="GB")
    parser.add_argument("--case", nargs=4, metavar=("SHAPE", "PRECISION", "LENGTHS", "GB"), help="this one alone, here")
    options = parser.parse_args(arguments)
    if options.case:
        row = json.dumps(case(*options.case[:3], int(options.case[3])))
        with open(common.RESULTS / "memory.jsonl", "a") as file:
            print(row, file=file)
        print(row)
    failed, done = 0, {(row["shape"], row["precision"], row["lengths"], row["card_gb"]) for row in kept()}
    for (shape, precision), lengths, gb in itertools.product(CASES, LENGTHS, options.cards):
        if (shape, precision, lengths, gb) in done:
            continue
        launcher = os.environ.get("BENCH_LAUNCHER", sys.executable)
        command = shlex.split(launcher.format(gb=gb, capability=CAPABILITY[precision]))
        command += ["-m", "bench.memory", "--case", shape, precision, lengths, str(gb)]
        ended = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
        outcome = ended.stdout.splitlines()[-1:] if ended.returncode == 0 else [ended.stderr[-2000:]]
        failed += ended.returncode != 0
        print(f"{shape}, {precision}, {lengths}, {gb} GB:", *outcome, flush=True)
    return failed


def kept() -> list[dict]:
    """The lines that there are."""
    path = common.RESULTS / "memory.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -------------------------------------------------------------------------------------------------- a case


def config(shape: str):
    """BERT base, or ALBERT v2 of this shape, with the dropout that they come with."""
    if shape == "bert-base":
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        return common.config("bert", 30522, *common.SHAPES["base"], **dropout)
    return common.config("albert", 30000, *common.SHAPES[shape], classifier_dropout_prob=0.1)


class Questions(torch.utils.data.Dataset):
    """Batches of questions of random tokens; lengths like RACE's, like its middle school's, or skewed.

    Skewed: most questions have 60 to 140 tokens a sequence, and one in seventeen has 500.
    """

    def __init__(self, lengths: str):
        self.lengths = lengths

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> list[dict]:
        chance = np.random.default_rng(step)
        return common.random_items([self.sequences(chance) for _ in range(QUESTIONS)], chance, 30000)

    def sequences(self, chance: np.random.Generator) -> np.ndarray:
        """[4] the lengths of a question's sequences, which share an article."""
        if self.lengths == "skewed":
            return (500 if chance.random() < 0.06 else chance.integers(60, 130)) + chance.integers(0, 12, 4)
        mean, deviation, least = {"race": (360, 110, 60), "middle": (250, 70, 90)}[self.lengths]
        article = int(np.clip(chance.normal(mean, deviation), least, 500))
        return np.clip(article + chance.integers(0, 14, 4), 20, 512)


def case(shape: str, precision: str, lengths: str, gb: int) -> dict:
    """Run the steps of a case on the CUDA device; returns its line."""
    import pytorch_lightning as pl

    card = torch.cuda.get_device_properties(0)
    module, parts, reserved = common.RaceModule(config=config(shape)), [], []

    class Marks(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            parts.append(len(list(batch.micro_batches(module.token_budget))))
            reserved.append(torch.cuda.memory_reserved())

    settings = {"batch_size": None, "collate_fn": common.collate, "pin_memory": True, "num_workers": 1}
    loader = torch.utils.data.DataLoader(Questions(lengths), **settings)
    out = False
    try:
        common.trainer(precision, "cuda", STEPS, [Marks()]).fit(module, loader)
    except (torch.OutOfMemoryError, common.RaceError) as error:
        print(error, file=sys.stderr)
        out = True
    row = {"shape": shape, "precision": precision, "lengths": lengths, "card_gb": gb, "out_of_memory": out}
    row |= {"capability": f"{card.major}.{card.minor}", "token_budget": module.token_budget, "steps": len(parts)}
    row |= {"micro_batches": statistics.median_low(parts or [0]), "most_micro_batches": max(parts, default=0)}
    row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    row["reserved_gb"] = round(reserved[min(ALMOST_ALL, len(reserved)) - 1] / 1e9, 2) if reserved else None
    return row | {"times_out_of_memory": torch.cuda.memory_stats()["num_ooms"]}


if __name__ == "__main__":
    sys.exit(main())
