"""Turn RACE into a token cache, once.

python generate_race_cache.py --source ehovy/race --model albert-base-v2 --out cache/race
"""

import argparse
import gc
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Build or verify a cache; returns the exit status."""
    options = parse(arguments)
    from race_cache import (
        CacheError,
        build_cache,
        verify_cache,
    )  # after --help and usage errors, which need no libraries
    from race_sources import SourceError

    try:
        if options.verify:
            problems = verify_cache(options.verify)
            print("\n".join(problems) or f"{options.verify}: every file agrees with the manifest")
            return 1 if problems else 0
        manifest = build_cache(
            options.source,
            options.model,
            options.out,
            options.max_qa_len,
            options.workers,
            options.force,
            options.skip_bad,
        )
    except (CacheError, SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(manifest, options.out))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn RACE into a token cache, once.")
    parser.add_argument("--source", help="hub id (ehovy/race), folder or tar of RACE files, or 'demo'")
    parser.add_argument(
        "--model", help="hub name (albert-base-v2) or folder whose tokenizer encodes; not needed for 'demo'"
    )
    parser.add_argument("--out", help="the cache folder to make, such as cache/race")
    parser.add_argument(
        "--max-qa-len", type=int, default=128, help="tokens of question+option that are kept (default 128)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="threads of the tokenizer (default: all cores)"
    )
    parser.add_argument("--force", action="store_true", help="replace a cache of other content")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out bad questions and passages, and list them in the cache"
    )
    parser.add_argument("--verify", metavar="CACHE", help="re-read a cache and check every file against its manifest")
    options = parser.parse_args(arguments)
    if options.source == "demo":
        options.model = options.model or "demo"
    missing = [f"--{name}" for name in ("source", "model", "out") if not getattr(options, name)]
    if missing and not options.verify:
        parser.error(f"{', '.join(missing)} needed (or --verify CACHE)")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: expected 1 or more")
    return options


def summary(manifest: dict, out: str | Path) -> str:
    """What the cache holds, for a person to read."""
    lines = [f"{out}: kept, the same cache is there already" if manifest.get("kept") else f"{out}: written"]
    for split, counts in manifest["splits"].items():
        levels = ", ".join(f"{count:,} {level or 'of unknown level'}" for level, count in counts["levels"].items())
        lines.append(
            f"  {split:<10} {counts['passages']:>7,} passages {counts['questions']:>7,} questions ({levels}), "
            f"{counts['tokens'] / counts['sequences']:.1f} tokens a sequence, "
            f"{counts['truncated'] / counts['sequences']:.1%} truncated, "
            f"{counts['token_bytes'] / counts['questions']:.0f} token bytes a question"
        )
    questions = sum(counts["questions"] for counts in manifest["splits"].values())
    size = sum(file["bytes"] for file in manifest["files"].values())
    lines.append(f"  articles in more than one split: {manifest['articles_in_more_than_one_split']:,}")
    lines += [f"  {note}" for note in manifest["notes"][:20]]
    if len(manifest["notes"]) > 20:
        lines.append(f"  … and {len(manifest['notes']) - 20} more, listed in {out}/left-out.txt")
    if not manifest["model"]["weights"]:
        lines.append(
            f"  {manifest['model']['name']} has no weights: training from this cache needs BASE_MODEL set in ex01"
        )
    lines.append(f"  {size / 1e6:.1f} MB")
    if not manifest.get("kept"):
        lines[-1] += f", {manifest['seconds']:.1f} s, {questions / manifest['seconds']:,.0f} questions a second"
    return "\n".join(lines)


if __name__ == "__main__":
    gc.disable()  # a short process with a million small strings and no cycles among them
    sys.exit(main())
