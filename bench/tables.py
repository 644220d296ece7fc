"""Writes the tables of bench/README.md from bench/results/*.json: what the page says is what was measured."""

import json
from pathlib import Path

from race.encoder import PACKED

PAGE = Path(__file__).with_name("README.md")
RESULTS = PAGE.with_name("results")
YET = "not measured yet"
MISSING = f"{YET}\n"
OUT = "out of memory"


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
    """The line under a table: where it was measured, and on which version."""
    on, versions = kept["machine"], kept["versions"]
    cores = f"{on['cores']} cores, load {on['load']}" if "load" in on else f"{on['cores']} cores"
    if instructions := [name for name in ("avx512_bf16", "amx_bf16") if on.get(name)]:
        cores += f", with {' and '.join(instructions)}"
    version = f"version {versions['this repository']}, " if "this repository" in versions else ""
    text = f"{version}torch {versions['torch']}, text: {kept['source']}"
    return f"\n{on['device']} ({on['processor']}, {cores}), {text}.\n"


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
        label = side.replace("ours", "this repository") if side.startswith("ours") else f"Hugging Face, {side}"
        if values.get("out_of_memory"):
            rows.append([label, OUT, "", "", ""])
            continue
        ratio = kept["ratios"].get(side)
        times = ratio["of_steps"] if isinstance(ratio, dict) else ratio
        parts = f" ({ratio['of_parts']['min']:.2f} – {ratio['of_parts']['max']:.2f})" if isinstance(ratio, dict) else ""
        rate, peak = values["questions_per_second"], kept["peak_mb"].get(side)
        share = values.get("share_of_matrix_product")
        rows.append(
            [
                label,
                f"{rate['median']:.3f}",
                "" if times is None else f"{times:.2f}{parts}",
                "" if share is None else f"{100 * share:.0f} %",
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


def answers() -> str:
    """How many answers half precision changes."""
    if not (kept := result("answers")):
        return MISSING
    cells = [f"{kept['questions']:,}", f"{100 * kept['share_that_differ']:.1f} %", f"{kept['largest_difference']:.1g}"]
    head = ["checkpoint", "questions", "answers that differ", "largest difference of a probability"]
    head.append("median lead of an answer over the next one")
    return table(head, [[kept["checkpoint"], *cells, f"{kept['median_lead']:.1g}"]]) + machine(kept)


def loader() -> str:
    """The loader alone."""
    if not (kept := result("loader")):
        return MISSING
    rows = []
    for workers, values in kept["workers"].items():
        share = values["share_of_training_step"]
        rates = values["questions_per_second"]
        rows.append([workers, f"{rates['median']:,.0f}", f"{values['batches_per_second']:,.0f}"])
        rows[-1].append("" if share is None else f"{100 * share:.4f} %")
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


def families() -> str:
    """A training step of each family."""
    if not (kept := result("families")):
        return MISSING
    rows = []
    for family, measured in kept["families"].items():
        way = "packed" if family.split(",")[0] in PACKED else "padded"
        seconds = measured["seconds"]["ours"]
        times = [f"{ratios['median']:.2f}" for ratios in measured["ratios"].values()]
        rows.append([family, way, f"{kept['questions'] / seconds:.2f}", *times])
    head = ["family", "way", "questions a second", *(f"times {side}" for side in measured["ratios"])]
    shape = kept["shape"]
    return table(head, rows) + machine(kept) + (
        f"{shape['num_hidden_layers']} layers of {shape['hidden_size']} places, {kept['questions']} questions, "
        f"groups of {kept['group']}, {kept['rounds']} round(s) after one for nothing.\n"
    )  # fmt: skip


def memory() -> str:
    """Micro-batches and memory of a training step, by card: the lines of bench.memory."""
    path = RESULTS / "memory.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {(row["shape"], row["precision"], row["card_gb"], row["lengths"]): row for row in rows}
    shapes = {"base": "ALBERT base", "large": "ALBERT large", "xlarge": "ALBERT xlarge", "bert-base": "BERT base"}

    def cell(shape: str, precision: str, card: int) -> str:
        of = [found.get((shape, precision, card, lengths)) for lengths in ("race", "middle", "skewed")]
        if None in of:
            return YET
        parts = " / ".join("out" if row["out_of_memory"] else str(row["micro_batches"]) for row in of)
        fitted = [row for row in of if not row["out_of_memory"]]
        most = [max(row[name] for row in fitted) for name in ("peak_gb", "reserved_gb")] if fitted else []
        return "; ".join([parts, *([", ".join(f"{value:.1f}" for value in most)] if most else [])])

    cards = (8, 16, 24, 40, 80)
    lines = [
        [f"{name}, {precision}", *(cell(shape, precision, card) for card in cards)]
        for shape, name in shapes.items()
        for precision in ("bf16-mixed", "16-mixed", "32-true")
    ]
    return table(["", *(f"{card} GB" for card in cards)], lines)


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
        cells = [YET] * 3
        if kept and kept["sides"]["ours"].get("out_of_memory"):
            cells = [OUT, "", ""]
        elif kept:
            ours, ratio = kept["sides"]["ours"], kept["ratios"].get("padded to 512")  # None: that was out of memory
            cells = [f"{ours['questions_per_second']['median']:,.0f}", f"{100 * ours['share_of_matrix_product']:.0f} %"]
            times = ratio["of_steps"] if isinstance(ratio, dict) else ratio
            cells.insert(1, f"padded to 512 is {OUT}" if times is None else f"{times:.2f}")
        rows.append([what, *cells])
    kept = result("gpu_epoch-cuda")
    epoch = f"{kept['race_epoch_seconds']:.0f} s" if kept else YET
    rows.append(["an epoch of RACE, extrapolated from 200 steps", epoch, "", ""])
    for stage in ("e1", "e2", "e3"):
        kept = result(f"gpu_chain-{stage}-cuda")
        score = (
            f"{100 * kept['accuracy']:.1f} % ({100 * kept['ci_low']:.1f} % – {100 * kept['ci_high']:.1f} %)"
            if kept
            else YET
        )
        rows.append([f"chain with all-MiniLM-L6-v2, {stage}, accuracy on RACE/dev", score, "", ""])
    head = ["", "questions a second, or result", "times padded to 512", "% of the matrix-product rate"]
    return table(head, rows)


TABLES = {
    "cache": cache,
    "train_step": lambda: sides("train_step"),
    "train_step_bf16": lambda: sides("train_step-bf16"),
    "evaluate": lambda: sides("evaluate"),
    "evaluate_bf16": lambda: sides("evaluate-bf16"),
    "answers": answers,
    "loader": loader,
    "scaling": scaling,
    "startup": startup,
    "families": families,
    "memory": memory,
    "gpu": gpu,
}

if __name__ == "__main__":
    main()
