"""Making a token cache: ours against a datasets.map in the style of the peers, from the same files to files on disk.

The peers' style: one row a question; for each option, article and question+option are tokenised together, truncated
and padded to 512, batched, in two processes. Each side runs in a fresh process; its libraries are loaded before the
clock starts, and its tokenizer and its reading of the files are on the clock.
"""

import argparse
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import common


def main(arguments: list[str] | None = None) -> None:
    """Measure, and keep the result."""
    parser = common.parser(__doc__, rounds=2, passages=20000)  # passages of the training split
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--files", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(SIDES[options.side](options.files, Path(out) / "cache")))
        return
    last, passages = {}, common.read_source(common.at_hand(common.RACE))[0]["train"]
    with tempfile.TemporaryDirectory() as folder:
        questions = common.write_records(passages[: options.passages], Path(folder) / "train")

        def run(side: str) -> float:
            os.sync()  # what was written before is not paid for here
            command = [sys.executable, "-m", "bench.cache", "--side", side, "--files", folder]
            output = subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True, text=True).stdout
            last[side] = json.loads(output.splitlines()[-1])
            return last[side]["seconds"]

        seconds = common.in_turn({side: (lambda side=side: run(side)) for side in SIDES}, options.rounds)
    result = {"questions": questions, "sides": {}}
    for side in SIDES:
        rate = common.spread([questions / value for value in seconds[side]])
        kept = {"bytes_per_question": last[side]["bytes"] / questions, "peak_mb": last[side]["peak_mb"]}
        result["sides"][side] = {"questions_per_second": rate} | kept
    rates = [result["sides"][side]["questions_per_second"]["median"] for side in SIDES]
    common.report("cache", result | {"ratio": rates[0] / rates[1]})


def ours(files: str, out: Path) -> dict:
    import transformers

    build_cache = common.build_cache
    assert transformers.AutoTokenizer and transformers.AutoConfig
    gc.disable()  # as generate_race_cache.py does
    start = time.perf_counter()
    manifest = build_cache(files, common.at_hand(common.ALBERT), out)
    seconds = time.perf_counter() - start
    stored = sum(counts["token_bytes"] for counts in manifest["splits"].values())
    return {"seconds": seconds, "bytes": stored, "peak_mb": _peak_mb()}


def peers(files: str, out: Path) -> dict:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    folder = common.at_hand(common.ALBERT)
    if folder == "demo":
        folder = tempfile.mkdtemp()
        common.write_model(folder)
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for path in sorted(Path(files).glob("train/*.json")):
        record = json.loads(path.read_text())
        for question, options, answer in zip(record["questions"], record["options"], record["answers"], strict=True):
            rows.append({"article": record["article"], "question": question, "options": options, "answer": answer})

    def encode(batch: dict) -> dict:
        first = [article for article in batch["article"] for _ in range(4)]
        second = [
            re.sub("_+", lambda _, option=option: option, question) if "_" in question else f"{question} {option}"
            for question, options in zip(batch["question"], batch["options"], strict=True)
            for option in options
        ]
        settings = {"truncation": True, "padding": "max_length", "max_length": 512, "return_token_type_ids": True}
        encoded = tokenizer(first, second, **settings)
        return {name: [values[i : i + 4] for i in range(0, len(values), 4)] for name, values in encoded.items()}

    dataset = datasets.Dataset.from_list(rows).map(encode, batched=True, num_proc=2, remove_columns=list(rows[0]))
    dataset.save_to_disk(out)
    seconds = time.perf_counter() - start
    stored = sum(path.stat().st_size for path in out.rglob("*.arrow"))
    return {"seconds": seconds, "bytes": stored, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """Peak resident memory of this process and of its largest child."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(each).ru_maxrss for each in who) / 1024


SIDES = {"ours": ours, "peers": peers}

if __name__ == "__main__":
    main()
