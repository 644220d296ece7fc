"""The memory of training steps on a CUDA device: one case, or with --cards every case in a process of its own.

A case is a model's shape, a precision, and how long the questions are; it runs steps of 32 questions of random tokens
as Lightning runs them in a stage, and adds a line to bench/results/memory.jsonl: how many micro-batches a step took,
what was allocated at most, what was reserved after 40 steps, and whether the memory was enough.

    python -m bench.memory --shape base --precision bf16-mixed --lengths race
    python -m bench.memory --cards 8 16 24 40 80

The second starts a case for each size of card in GB, with Python or with the command that BENCH_LAUNCHER or --launcher
gives: in it, {gb} and {capability} stand for the card that it should choose. A case that has its line is not run again.
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

SHAPES = ("base", "large", "xlarge", "bert-base")
PRECISIONS = {"bf16-mixed": "8.0", "16-mixed": "7.5", "32-true": "8.0"}  # and the compute capability of its card
LENGTHS = ("race", "middle", "skewed")
QUESTIONS = 32
ALMOST_ALL = 40  # steps after which the reserved memory is noted


def main(arguments: list[str] | None = None) -> int:
    """Run one case, or all; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=SHAPES)
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--lengths", choices=LENGTHS, nargs="+", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--cards", type=int, nargs="+", metavar="GB", help="run every case for cards of these sizes")
    parser.add_argument("--card", type=int, metavar="GB", help="the card's size as it is called (as the device says)")
    parser.add_argument("--launcher", default=os.environ.get("BENCH_LAUNCHER", sys.executable))
    options = parser.parse_args(arguments)
    cases = itertools.product(options.shape, options.precision, options.lengths)
    if options.cards:
        return all_cases([(*case, gb) for case in cases for gb in options.cards], options)
    for shape, precision, lengths in cases:
        keep(case(shape, precision, lengths, options))
    return 0


def all_cases(cases: list[tuple], options: argparse.Namespace) -> int:
    """Start a process for each case that has no line yet; returns how many failed."""
    failed, done = 0, {(row["shape"], row["precision"], row["lengths"], row["card_gb"]) for row in kept()}
    for number, (shape, precision, lengths, gb) in enumerate(cases, 1):
        if (shape, precision, lengths, gb) in done:
            continue
        command = shlex.split(options.launcher.format(gb=gb, capability=PRECISIONS[precision]))
        command += ["-m", "bench.memory", "--shape", shape, "--precision", precision, "--lengths", lengths]
        command += ["--card", str(gb), "--steps", str(options.steps)]
        ended = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
        outcome = ended.stdout.splitlines()[-1:] if ended.returncode == 0 else [ended.stderr[-2000:]]
        failed += ended.returncode != 0
        print(f"{number} of {len(cases)}: {shape}, {precision}, {lengths}, {gb} GB:", *outcome, flush=True)
    return failed


def kept() -> list[dict]:
    """The lines that there are."""
    path = common.RESULTS / "memory.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(row: dict) -> None:
    """Add a line."""
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    with open(common.RESULTS / "memory.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


# -------------------------------------------------------------------------------------------------- a case


def config(shape: str):
    """BERT base, or ALBERT v2 of this shape, with the dropout that they come with."""
    from transformers import AlbertConfig, BertConfig

    if shape == "bert-base":
        return BertConfig()
    hidden, heads, intermediate, layers = common.SHAPES[shape]
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AlbertConfig(num_hidden_layers=layers, **sizes, **none)


class Questions(torch.utils.data.Dataset):
    """`steps` batches of questions of random tokens; lengths like RACE's, like its middle school's, or skewed.

    Skewed: most questions have 60 to 140 tokens a sequence, and one in seventeen has 500.
    """

    def __init__(self, lengths: str, steps: int):
        self.lengths, self.steps = lengths, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[dict]:
        chance, items = np.random.default_rng(step), []
        for _ in range(QUESTIONS):
            lengths = self.sequences(chance)
            ids = [chance.integers(5, 30000, length) for length in lengths]
            segments = [np.repeat([0, 1], [length - 12, 12]) for length in lengths]
            items.append({"input_ids": ids, "token_type_ids": segments, "label": 0})
        return items

    def sequences(self, chance: np.random.Generator) -> np.ndarray:
        """[4] the lengths of a question's sequences, which share an article."""
        if self.lengths == "skewed":
            return (500 if chance.random() < 0.06 else chance.integers(60, 130)) + chance.integers(0, 12, 4)
        mean, deviation, least = {"race": (360, 110, 60), "middle": (250, 70, 90)}[self.lengths]
        article = int(np.clip(chance.normal(mean, deviation), least, 500))
        return np.clip(article + chance.integers(0, 14, 4), 20, 512)


def case(shape: str, precision: str, lengths: str, options: argparse.Namespace) -> dict:
    """Run the steps of a case on the CUDA device; returns its line."""
    import pytorch_lightning as pl

    from race import RaceError
    from race.data import collate
    from race_module import RaceModule

    card = torch.cuda.get_device_properties(0)
    module, parts, tokens, reserved = RaceModule(config=config(shape)), [], [], []

    class Marks(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            parts.append(len(list(batch.micro_batches(module.token_budget))))
            tokens.append(sum(batch.lengths))
            reserved.append(torch.cuda.memory_reserved())

    loader = torch.utils.data.DataLoader(
        Questions(lengths, options.steps), batch_size=None, collate_fn=collate, pin_memory=True, num_workers=1
    )
    out = False
    try:
        common.trainer(precision, "cuda", options.steps, [Marks()]).fit(module, loader)
    except (torch.OutOfMemoryError, RaceError) as error:
        print(error, file=sys.stderr)
        out = True
    row = {"shape": shape, "precision": precision, "lengths": lengths}
    row |= {"card_gb": options.card or round(card.total_memory / 1e9), "capability": f"{card.major}.{card.minor}"}
    row |= {"questions": QUESTIONS, "steps": len(parts), "out_of_memory": out, "token_budget": module.token_budget}
    row |= {"micro_batches": statistics.median_low(parts or [0]), "most_micro_batches": max(parts, default=0)}
    row |= {"most_tokens": max(tokens, default=0), "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
    row["reserved_gb"] = round(reserved[min(ALMOST_ALL, len(reserved)) - 1] / 1e9, 2) if reserved else None
    stats = torch.cuda.memory_stats()
    return row | {"allocations_repeated": stats["num_alloc_retries"], "times_out_of_memory": stats["num_ooms"]}


if __name__ == "__main__":
    sys.exit(main())
