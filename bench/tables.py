"""Writes the tables of bench/README.md from bench/results/*.json: what the page says is what was measured."""

import json
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")
RESULTS = PAGE.with_name("results")
MISSING = "not measured\n"


def main() -> None:
    """Put the tables of the present results into the page."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """The page with each place `<!-- NAME -->` … `<!-- end -->` filled with the table of that name."""
    for name, table in TABLES.items():
        before, found, rest = page.partition(f"<!-- {name} -->\n")
        if not found:
            raise ValueError(f"{PAGE} has no place for the table {name}: <!-- {name} -->")
        page = before + found + "\n" + table() + "\n" + rest[rest.index("<!-- end -->") :]
    return page


def result(name: str) -> dict | None:
    """A kept result, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(kept: dict) -> str:
    """The line under a table: where it was measured."""
    on, versions = kept["machine"], kept["versions"]
    cores = f"{on['cores']} cores, load {on['load']}" if "load" in on else f"{on['cores']} cores"
    return f"\n{on['device']} ({on['processor']}, {cores}), torch {versions['torch']}, text: {kept['source']}.\n"


def cache() -> str:
    """Making the cache."""
    if not (kept := result("cache")):
        return MISSING
    rows = [
        [
            {"ours": "`generate_race_cache.py`", "peers": "`datasets.map`, pairs padded to 512, two processes"}[side],
            f"{values['questions_per_second']['median']:,.0f}",
            f"{values['bytes_per_question']:,.0f}",
            f"{values['peak_mb'] / 1e3:.2f}",
        ]
        for side, values in kept["sides"].items()
    ]
    head = ["", "questions a second", "token bytes a question", "peak memory, GB"]
    return table(head, rows) + machine(kept) + f"{kept['ratio']:.1f} times as fast; {kept['questions']:,} questions.\n"


def sides(name: str) -> str:
    """A training step, or scoring."""
    if not (kept := result(name)):
        return MISSING
    rows = []
    for side, values in kept["sides"].items():
        ratio = kept["ratios"].get(side)
        times = ratio["of_steps"] if isinstance(ratio, dict) else ratio
        parts = f" ({ratio['of_parts']['min']:.2f} – {ratio['of_parts']['max']:.2f})" if isinstance(ratio, dict) else ""
        rate, peak = values["questions_per_second"], kept["peak_mb"].get(side)
        rows.append(
            [
                "this repository" if side == "ours" else f"Hugging Face, {side}",
                f"{rate['median']:.3f}",
                "" if times is None else f"{times:.2f}{parts}",
                f"{values['share_of_matrix_product']:.0%}",
                "" if peak is None else f"{peak / 1e3:.2f}",
            ]
        )
    head = [
        "",
        "questions a second",
        "ours: times (parts)",
        "% of the matrix-product rate",
        "peak memory, GB",
    ]
    note = (
        f"{kept['shape']} shape, {kept['precision']}, {kept['questions']} questions of "
        f"{kept['tokens_per_sequence']:.0f} tokens a sequence, groups of {kept['group']}, {kept['rounds']} round(s); "
        f"matrix product {kept['matrix_product_gflops']['median']:,.0f} GFLOP/s "
        f"({kept['matrix_product_gflops']['min']:,.0f} – {kept['matrix_product_gflops']['max']:,.0f}).\n"
    )
    return table(head, rows) + machine(kept) + note


def loader() -> str:
    """The loader alone."""
    if not (kept := result("loader")):
        return MISSING
    rows = []
    for workers, values in kept["workers"].items():
        share = values["share_of_training_step"]
        rates = values["questions_per_second"]
        rows.append([workers, f"{rates['median']:,.0f}", f"{values['batches_per_second']:,.0f}"])
        rows[-1].append("" if share is None else f"{share:.4%}")
    head = ["workers", "questions a second", "batches of 32 a second", "% of a training step"]
    return table(head, rows) + machine(kept)


def scaling() -> str:
    """How cost grows."""
    if not (kept := result("scaling")):
        return MISSING
    rows = [
        [
            row["part"],
            f"{row['questions']:,}",
            f"{row['seconds']:.2f}",
            f"{row['questions_per_second']:,.0f}",
            f"{row['peak_mb']:.0f}",
        ]
        for row in kept["cache"]
    ]
    text = table(["of the data", "questions", "seconds", "questions a second", "peak memory, MB"], rows) + "\n"
    rows = [
        [f"{row['tokens']:,}", f"{row['seconds']:.2f}", f"{row['ms_per_token']:.2f}", f"{row['peak_mb']:.0f}"]
        for row in kept["step"]
    ]
    text += table(["tokens at once", "seconds", "milliseconds a token", "peak memory, MB"], rows)
    two = kept["processes"]
    return text + machine(kept) + (
        f"Two data-parallel processes of one thread each against one: {two['speed_up']:.2f} times as fast "
        f"({two['one_process_seconds']:.1f} s and {two['two_processes_seconds']:.1f} s, of which exchanging gradients "
        f"{two['of_which_exchange_seconds']:.2f} s).\n"
    )  # fmt: skip


def startup() -> str:
    """From import to the first step."""
    if not (kept := result("startup")):
        return MISSING
    rows = [[phase, f"{values['median']:.2f}"] for phase, values in kept["seconds"].items()]
    imports = ", ".join(f"{name} {seconds:.2f}" for name, seconds in list(kept["slowest_imports"].items())[:6])
    total = [["together", f"{kept['total']:.2f}"]]
    return table(["", "seconds"], rows + total) + machine(kept) + f"Slowest imports, self time in seconds: {imports}.\n"


def gpu() -> str:
    """What a GPU day has measured."""
    asked = {
        "train_step-cuda": "training step, base shape, bf16",
        "train_step-large-cuda": "training step, large shape, bf16",
        "train_step-xlarge-cuda": "training step, xlarge shape, bf16",
        "evaluate-cuda": "scoring, base shape, bf16",
    }
    rows = []
    for name, what in asked.items():
        kept = result(name)
        cells = ["not measured"] * 3
        if kept:
            ours, ratio = kept["sides"]["ours"], kept["ratios"]["padded to 512"]
            cells = [f"{ours['questions_per_second']['median']:,.0f}", f"{ours['share_of_matrix_product']:.0%}"]
            cells.insert(1, f"{ratio['of_steps'] if isinstance(ratio, dict) else ratio:.2f}")
        rows.append([what, *cells])
    kept = result("gpu_epoch-cuda")
    epoch = f"{kept['race_epoch_seconds']:.0f} s" if kept else "not measured"
    rows.append(["an epoch of RACE, extrapolated from 200 steps", epoch, "", ""])
    for stage in ("e1", "e2", "e3"):
        kept = result(f"gpu_chain-{stage}-cuda")
        score = f"{kept['accuracy']:.1%} ({kept['ci_low']:.1%} – {kept['ci_high']:.1%})" if kept else "not measured"
        rows.append([f"chain with all-MiniLM-L6-v2, {stage}, accuracy on RACE/dev", score, "", ""])
    head = ["", "questions a second, or result", "times padded to 512", "% of the matrix-product rate"]
    return table(head, rows)


TABLES = {
    "cache": cache,
    "train_step": lambda: sides("train_step"),
    "evaluate": lambda: sides("evaluate"),
    "loader": loader,
    "scaling": scaling,
    "startup": startup,
    "gpu": gpu,
}

if __name__ == "__main__":
    main()
