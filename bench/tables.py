"""Writes the tables of bench/README.md from bench/results/*.json: what the page says is what was measured."""

import json
from pathlib import Path

from bench import common
from bench.memory import CASES

PAGE = Path(__file__).with_name("README.md")
YET = "not measured yet"
OUT = "out of memory"


def main() -> None:
    """Put the tables of the present results into the page."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """The page with each place `<!-- NAME -->` … `<!-- end -->` filled with the table of that name."""
    for name, table_of in TABLES.items():
        before, found, rest = page.partition(f"<!-- {name} -->\n")
        if not found:
            raise ValueError(f"{PAGE} has no place for the table {name}: <!-- {name} -->")
        kept = common.kept_result(name)
        made = table_of(kept) if kept or name in ("memory", "gpu") else f"{YET}\n"
        page = before + found + made + rest[rest.index("<!-- end -->") :]
    return page


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | None, form: str, unit: str = "") -> str:
    """A number of a table; nothing where there is none."""
    return "" if value is None else f"{value:{form}}{unit}"


def machine(kept: dict) -> str:
    """The line under a table: where it was measured, and on which version."""
    on, versions = kept["machine"], kept["versions"]
    cores = f"{on['cores']} cores, load {on['load']}" if "load" in on else f"{on['cores']} cores"
    if instructions := [name for name in common.BF16_INSTRUCTIONS if on.get(name)]:
        cores += f", with {' and '.join(instructions)}"
    version = f"version {versions['this repository']}, " if "this repository" in versions else ""
    text = f"{version}torch {versions['torch']}, text: {kept['source']}"
    return f"\n{on['device']} ({on['processor']}, {cores}), {text}.\n"


def cache(kept: dict) -> str:
    """Making the cache."""
    names = {"ours": "`generate_race_cache.py`", "peers": "`datasets.map`, pairs padded to 512, two processes"}
    rows = []
    for side, values in kept["sides"].items():
        numbers = [values["questions_per_second"]["median"], values["bytes_per_question"]]
        rows.append([names[side], *(number(it, ",.0f") for it in numbers), number(values["peak_mb"] / 1e3, ".2f")])
    head = ["", "questions a second", "token bytes a question", "peak memory, GB"]
    return table(head, rows) + machine(kept) + f"{kept['ratio']:.1f} times as fast; {kept['questions']:,} questions.\n"


def of_steps(ratio: dict | float | None) -> float | None:
    """How many times as fast a step is; None where a side ran out of memory."""
    return ratio["of_steps"] if isinstance(ratio, dict) else ratio


def sides(kept: dict) -> str:
    """A training step, or scoring."""
    rows = []
    for side, values in kept["sides"].items():
        name = side.replace("ours", "this repository") if side.startswith("ours") else f"Hugging Face, {side}"
        if values.get("out_of_memory"):
            rows.append([name, OUT, "", "", ""])
            continue
        ratio, peak = kept["ratios"].get(side), kept["peak_mb"].get(side)
        times, share = number(of_steps(ratio), ".2f"), values.get("share_of_matrix_product")
        if isinstance(ratio, dict):
            times += " ({min:.2f} – {max:.2f})".format(**ratio["of_parts"])
        rows.append([name, number(values["questions_per_second"]["median"], ".3f"), times])
        rows[-1] += [number(share and 100 * share, ".0f", " %"), number(peak and peak / 1e3, ".2f")]
    head = ["", "questions a second", "ours: times (parts)", "% of the matrix-product rate", "peak memory, GB"]
    note = (
        f"{kept['shape']} shape, {kept['precision']}, {kept['questions']} questions of "
        f"{kept['tokens_per_sequence']:.0f} tokens a sequence, groups of {kept['group']}, {kept['rounds']} round(s); "
    )
    rate = "matrix product {median:,.0f} GFLOP/s ({min:,.0f} – {max:,.0f}).\n".format(**kept["matrix_product_gflops"])
    return table(head, rows) + machine(kept) + note + rate


def families(kept: dict) -> str:
    """A training step of each family."""
    rows = []
    for family, measured in kept["families"].items():
        way, seconds = "packed" if family in common.PACKED else "padded", measured["seconds"]["ours"]
        times = [number(ratios["median"], ".2f") for ratios in measured["ratios"].values()]
        rows.append([family, way, number(kept["questions"] / seconds, ".2f"), *times])
    head = ["family", "way", "questions a second", *(f"times {side}" for side in common.SIDES[1:])]
    shape = kept["shape"]
    return table(head, rows) + machine(kept) + (
        f"{shape['num_hidden_layers']} layers of size {shape['hidden_size']}, {kept['questions']} questions, "
        f"groups of {kept['group']}, {kept['rounds']} round(s) after one to warm up.\n"
    )  # fmt: skip


def memory(_=None) -> str:
    """Micro-batches and memory of a training step, by card: the lines of bench.memory."""
    path, cards = common.RESULTS / "memory.jsonl", (8, 16, 24, 40, 80)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {(row["shape"], row["precision"], row["card_gb"], row["lengths"]): row for row in rows}
    shapes = {"base": "ALBERT base", "large": "ALBERT large", "xlarge": "ALBERT xlarge", "bert-base": "BERT base"}

    def cell(*case) -> str:
        of = [found.get((*case, lengths)) for lengths in ("race", "middle", "skewed")]
        if None in of:
            return YET
        parts = " / ".join("out" if row["out_of_memory"] else str(row["micro_batches"]) for row in of)
        fitted = [row for row in of if not row["out_of_memory"]]
        most = [f"{max(row[name] for row in fitted):.1f}" for name in ("peak_gb", "reserved_gb") if fitted]
        return "; ".join([parts, *([", ".join(most)] if most else [])])

    lines = [
        [f"{shapes[shape]}, {precision}", *(cell(shape, precision, card) for card in cards)]
        for shape, precision in CASES
    ]
    return table(["", *(f"{card} GB" for card in cards)], lines)


def gpu(_=None) -> str:
    """What a GPU day has measured."""
    if not (kept := common.gpu_results()):
        return f"{YET}\n"
    rows = []
    for name, what in {
        "train_step": "training step, base shape, bf16",
        "train_step-compile": "training step, base shape, bf16, compiled",
        "evaluate": "scoring, base shape, bf16",
    }.items():
        cells = [YET, "", ""]
        if found := kept.get(name):
            ours, times = found["sides"]["ours"], of_steps(found["ratios"].get(common.SIDES[1]))
            cells = [number(ours["questions_per_second"]["median"], ",.0f"), number(times, ".2f") or f"padded is {OUT}"]
            cells.append(number(100 * ours["share_of_matrix_product"], ".0f", " %"))
        rows.append([what, *cells])
    if found := kept.get("gpu_epoch"):
        rows.append(["an epoch of RACE, from 200 steps", f"{found['race_epoch_seconds']:.0f} s", "", ""])
    if found := kept.get("gpu_exact"):
        same = ", ".join(name.replace("_", " ") for name, equal in found.items() if equal is True)
        rows.append(["killed and resumed: equal to the last bit", same or "nothing", "", ""])
    for found in (it for it in kept.values() if "accuracy" in it):
        score = "{accuracy:.1%} ({ci_low:.1%} – {ci_high:.1%})".format(**found).replace("%", " %")
        what = "all-MiniLM-L6-v2, {recipe}, seed {seed}, {stage}: accuracy on RACE/dev".format(**found)
        rows.append([what, score, "", ""])
    head = ["", "questions a second, or result", "times padded to 512", "% of the matrix-product rate"]
    return table(head, rows) + machine(next(iter(kept.values())))


TABLES = {"cache": cache} | dict.fromkeys(("train_step", "train_step-bf16", "evaluate-bf16"), sides)
TABLES |= {"families": families, "memory": memory, "gpu": gpu}

if __name__ == "__main__":
    main()
