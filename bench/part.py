"""A part of RACE that a small model can be trained on without a GPU: short passages, drawn at random, in three splits.

python -m bench.part RACE.tar.gz part --longest 200 --questions 2000 400 1000
The passages of all splits of the source are shuffled and dealt out: these are not RACE's own splits. The folder has
RACE records, a line each, and is a source for generate_race_cache.py.
"""

import argparse
import json
import random
from pathlib import Path

from race import LETTERS, SPLITS
from race.data.passages import Passage, read_source
from race.files import atomic_write


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.part", description=__doc__.split("\n", 1)[0])
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--longest", type=int, default=200, help="words of a passage")
    parser.add_argument("--questions", type=int, nargs=3, default=(2000, 400, 1000), help="train, validation, test")
    options = parser.parse_args(arguments)
    passages, _ = read_source(options.source)
    every = [it._replace(example_id=f"{split}-{it.example_id}") for split, found in passages.items() for it in found]
    short = [it for it in every if len(it.article.split()) <= options.longest]
    random.Random(0).shuffle(short)
    for split, count in zip(SPLITS, options.questions, strict=True):
        drawn = take(short, count)
        lines = "\n".join(json.dumps(record(passage), ensure_ascii=False) for passage in drawn)
        atomic_write(options.out / f"{split}.jsonl", lambda file, lines=lines: file.write_text(lines, encoding="utf-8"))
        print(f"{split}: {sum(len(it.questions) for it in drawn):,} questions on {len(drawn):,} passages")


def take(passages: list[Passage], questions: int) -> list[Passage]:
    """Passages from the end, which are taken away, until they have so many questions."""
    taken: list[Passage] = []
    while passages and sum(len(it.questions) for it in taken) < questions:
        taken.append(passages.pop())
    return taken


def record(passage: Passage) -> dict:
    """A passage in RACE's own layout."""
    answers = [LETTERS[label] for label in passage.labels]
    parts = {"article": passage.article, "questions": passage.questions, "options": passage.options}
    return {"id": passage.example_id} | parts | {"answers": answers}


if __name__ == "__main__":
    main()
