"""Turn a checkpoint into a folder that transformers loads by itself, with a model card.

python -m race.export checkpoints/race/e3-….ckpt export/race-e3 --cache cache/race --results runs/race/results.csv
"""

import argparse
import sys

from safetensors import SafetensorError

from race import RaceError


def main(arguments: list[str] | None = None) -> int:
    """Export one checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m race.export", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="a .ckpt file of any stage")
    add("out_dir", metavar="out", help="the folder to make, such as export/race-e3")
    add("--cache", dest="cache_dir", default="cache/race", help="the cache it was trained with (default cache/race)")
    add("--results", help="results.csv of the evaluation notebooks; without it the card has no scores")
    add("--repo", metavar="USER/NAME", help="the hub repository it is meant for, named in the card")
    add("--force", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)
    from race.export.folder import export_checkpoint  # after --help and usage errors, which need no libraries

    try:
        out = export_checkpoint(**vars(options))
    except (RaceError, OSError, SafetensorError) as error:
        print("error:", *([] if isinstance(error, RaceError) else [f"{options.out_dir}:"]), error, file=sys.stderr)
        return 1
    print(f"{out}: loaded by transformers alone, it has the logits of the checkpoint")
    print(f"to upload it: hf upload {options.repo or 'USER/NAME'} {out} .")
    return 0


if __name__ == "__main__":
    sys.exit(main())
