"""Turn RACE into a token cache, once.

python generate_race_cache.py --source ehovy/race --model albert-base-v2 --out cache/race
"""

import argparse
import gc
import os
import re
import sys
from pathlib import Path

from safetensors import SafetensorError

from race import COLUMNS, MAX_QA_LEN, OPTIONS, RaceError

# of --keep: none of the predictions' own columns
KEPT = r"(?!(id|options|level|answer|kind|prediction|truncated|sequence|example_id|question(_index)?|"
KEPT += r"article(_tokens|_in_\w+)?|p_\w)$)[\w ]+"


def main(arguments: list[str] | None = None) -> int:
    """Build or verify a cache; returns the exit status."""
    options = parse(arguments)
    from race.data.cache import Reading, build_cache, verify_cache  # takes seconds: not before --help, usage errors

    try:
        if options.verify:
            problems = verify_cache(options.verify)
            print("\n".join(problems) or f"{options.verify}: every file agrees with the manifest")
            return 1 if problems else 0
        os.environ.setdefault("RAYON_NUM_THREADS", str(options.workers))  # of the tokenizers
        given = {name: getattr(options, name) for name in ("source", "model", "out", "max_qa_len", "force", "skip_bad")}
        manifest = build_cache(**given, how=Reading(True, options.columns, options.numbering))
    except (RaceError, OSError, SafetensorError) as error:  # the last: a full disk
        where = "" if isinstance(error, RaceError) else f"{options.out or options.verify}: "
        print(f"error: {where}{error}", file=sys.stderr)
        return 1
    print(summary(manifest, options.out))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; ends the process after --help or a usage error."""
    parser = argparse.ArgumentParser(description="Turn RACE into a token cache, once.")
    add = parser.add_argument
    add("--source", help="hub id (ehovy/race), folder, tar, zip or file of questions, or 'demo'")
    add("--model", help="hub name (albert-base-v2) or folder with the tokenizer to use; not needed for 'demo'")
    add("--out", help="the cache folder to make, such as cache/race")
    last = "truncate question+option from the left to N tokens"
    add("--max-qa-len", type=int, metavar="N", default=MAX_QA_LEN, help=last)
    stands = "what stands for article (article=: there are none), question, options (options=a,b,c), answer, id, level"
    add("--columns", nargs="+", action="extend", metavar="NAME=COLUMN", default=[], help=f"{stands}; a.b is nested")
    add("--keep", nargs="+", action="extend", metavar="COLUMN", default=[], help="further columns for GROUP_BY")
    numbered = "how answers are written: letters (the default), numbers from 0 or from 1, or the text of the option"
    add("--answers", choices=("letters", "0", "1", "text"), default="letters", dest="numbering", help=numbered)
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads of the tokenizer (default: all cores)")
    add("--force", action="store_true", help="replace a cache with other content")
    add("--skip-bad", action="store_true", help="leave out bad questions and passages, and list them in the cache")
    add("--verify", metavar="CACHE", help="re-read a cache and compare every file with its manifest")
    options = parser.parse_args(arguments)
    if options.source == "demo":
        options.model = options.model or "demo"
    pairs = [pair.partition("=") for pair in options.columns]
    given = [name for name, *_ in pairs]
    if wrong := [name for name, sign, _ in pairs if name not in COLUMNS or not sign or given.count(name) > 1]:
        parser.error(f"--columns {', '.join(wrong)}: expected once article=, question=, options=, answer=, id=, level=")
    if wrong := [name for name in options.keep if not re.fullmatch(KEPT, name)]:
        parser.error(f"--keep {', '.join(wrong)}: expected names (letters, digits, _) that predictions lack")
    options.columns = tuple((name, tuple(filter(None, given.split(",")))) for name, _, given in pairs)
    options.columns += tuple((name, (name,)) for name in dict.fromkeys(options.keep))
    missing = [f"--{name}" for name in ("source", "model", "out") if not getattr(options, name)]
    if missing and not options.verify:
        parser.error(f"{', '.join(missing)} needed (or --verify CACHE)")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: expected 1 or more")
    return options


def summary(manifest: dict, out: str | Path) -> str:
    """What the cache holds, as text for people."""
    lines = [f"{out}: kept, the same cache is there already" if manifest.get("kept") else f"{out}: written"]
    for split, counts in manifest["splits"].items():
        levels = ", ".join(f"{count:,} {level or 'of unknown level'}" for level, count in counts["levels"].items())
        lines.append(
            f"  {split:<10} {counts['passages']:>7,} passages {counts['questions']:>7,} questions ({levels}), "
            f"{counts['tokens'] / counts['sequences']:.1f} tokens per sequence, "
            f"{100 * counts['truncated'] / counts['sequences']:.1f} % truncated"
        )
    what = "" if manifest.get("template", {"between": 1})["between"] else "; no articles"
    lines.append(f"  {manifest.get('options', OPTIONS)} options a question{what}")
    lines.append(f"  articles in more than one split: {manifest['articles_in_more_than_one_split']:,}")
    lines += [f"  {note}" for note in manifest["notes"][:20]]
    if more := manifest["notes"][20:]:
        lines.append(f"  … and {len(more)} more, listed in {out}/left-out.txt")
    if not manifest["model"]["weights"]:
        lines.append(f"  {manifest['model']['name']} has no weights: set BASE_MODEL in ex01 to train with this cache")
    size = sum(file["bytes"] for file in manifest["files"].values())
    return "\n".join([*lines, f"  {size / 1e6:.1f} MB, made in {manifest['seconds']:.1f} s"])


if __name__ == "__main__":
    gc.disable()  # a short process that makes a million small strings and no cycles
    sys.exit(main())
