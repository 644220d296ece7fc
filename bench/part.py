"""A part of RACE that a small model can be trained on without a GPU: short passages, drawn at random, in three splits.

python -m bench.part RACE.tar.gz part --longest 200 --questions 2000 400 1000
The passages of all splits of the source are shuffled and dealt out: these are not RACE's own splits. The folder has
RACE records, a line each, and is a source for generate_race_cache.py.
"""

import argparse
import json
import random
from pathlib import Path

from bench import common


def main(arguments: list[str] | None = None) -> None:
    """Draw the part and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.part", description=__doc__.split("\n", 1)[0])
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--longest", type=int, default=200, help="words of a passage")
    parser.add_argument("--questions", type=int, nargs=3, default=(2000, 400, 1000), help="train, validation, test")
    options = parser.parse_args(arguments)
    passages, _ = common.read_source(options.source)
    every = [it._replace(example_id=f"{split}-{it.example_id}") for split, found in passages.items() for it in found]
    short = [it for it in every if len(it.article.split()) <= options.longest]
    random.Random(0).shuffle(short)
    options.out.mkdir(parents=True, exist_ok=True)
    for split, wanted in zip(common.SPLITS, options.questions, strict=True):
        questions, lines = 0, []
        while short and questions < wanted:
            lines.append(json.dumps(common.record(short[-1]), ensure_ascii=False))
            questions += len(short.pop().questions)
        (options.out / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        print(f"{split}: {questions:,} questions on {len(lines):,} passages")


if __name__ == "__main__":
    main()
