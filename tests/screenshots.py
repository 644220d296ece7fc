"""Remake the pictures of the README: the demo in JupyterLab, run in a browser, cropped to what matters.

make screenshots
"""

import argparse
import sys
import tempfile
from pathlib import Path

from helpers import NOTEBOOKS, ROOT, STAGES
from lab import CHROMIUM_FLAGS, WIDTH, chromium, jupyter_lab, run_all_cells, with_parameters

from race.data.cache import build_cache
from race.recipes import FILES, read_recipes

SHOTS = {  # notebook: {name of the picture: what stands in the cell whose output is kept}
    "eval_test_dataset_race": {"errors": "error_browser("},
    "eval_test_dataset_race_2": {"chain": "comparison_figure(", "story": "story_figure("},
}
MARGIN, ABOVE = 8, 3  # pixels around a picture; more above would show the code's frame


def main(arguments: list[str] | None = None) -> int:
    """Run the five notebooks and write docs/*.png; returns the exit status."""
    parser = argparse.ArgumentParser(description="Remake the pictures of the README from the demo.")
    parser.add_argument("--limit-questions", type=int, help="try it on so many questions of each split")
    parser.add_argument("--out", default=ROOT / "docs", type=Path, help="where to (default docs)")
    options = parser.parse_args(arguments)
    if chromium() is None:
        print("error: no chromium: install it (apt-get install chromium) or name one in $CHROMIUM", file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary:
        folder, notebooks = Path(temporary) / "lab", Path(temporary) / "notebooks"
        folder.mkdir()
        build_cache("demo", "demo", notebooks / "cache" / "demo")
        places = {"CACHE_DIR": "cache/demo", "CHECKPOINT_DIR": "checkpoints/demo", "RUN_DIR": "runs/demo"}
        for name in NOTEBOOKS:
            stages = read_recipes(FILES["demo"])["chain"].stages
            training = dict(zip(STAGES, stages.values(), strict=True)).get(name, {})
            parameters = places | training | {"LIMIT_QUESTIONS": options.limit_questions}
            with_parameters(ROOT / f"{name}.ipynb", notebooks / f"{name}.ipynb", parameters)
        with jupyter_lab(folder, notebooks) as (address, token), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
            missing = [it for name in NOTEBOOKS for it in pictures(browser, address, token, name, options.out)]
            browser.close()
    for problem in missing:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if missing else 0


def pictures(browser, address: str, token: str, name: str, out: Path) -> list[str]:
    """Run a notebook and keep the outputs of the cells that are wanted; returns what is missing."""
    page, missing = browser.new_page(viewport={"width": WIDTH, "height": 900}), []
    run_all_cells(page, address, token, f"{name}.ipynb", seconds=600)
    for title, wanted in SHOTS.get(name, {}).items():
        cells = page.locator(".jp-CodeCell").filter(has_text=wanted)
        if cells.count() == 0:
            missing.append(f"{name}.ipynb has no cell with {wanted}")
            continue
        cells.first.scroll_into_view_if_needed()
        output = cells.first.locator(".jp-OutputArea-output").filter(has=page.locator("img, details")).first
        if output.locator("details").count():
            output.locator("details summary").first.click()
        figure = output.locator("img")
        box = (figure if figure.count() else output).first.bounding_box()
        clip = {"x": box["x"] - MARGIN, "y": box["y"] - ABOVE}
        clip |= {"width": box["width"] + 2 * MARGIN, "height": box["height"] + ABOVE + MARGIN}
        path = out / f"{title}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, clip=clip)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    page.close()
    return missing


if __name__ == "__main__":
    sys.exit(main())
