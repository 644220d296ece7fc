"""All five notebooks in JupyterLab, run in a real browser: `make test-browser`; pytest alone passes this file over."""

import re
import shutil

import nbformat
import pytest
from helpers import NOTEBOOKS, ROOT
from lab import CHROMIUM_FLAGS, WIDTH, chromium, jupyter_lab, run_all_cells, with_parameters

SCREENSHOTS = ROOT / "runs" / "browser"
RATES = dict(zip(NOTEBOOKS, (1e-2, 1e-2, 1e-3), strict=False))  # at which something happens in a few steps
EXPECTED_IN_VIEW = 40  # pixels; a figure that is not drawn is smaller


@pytest.fixture(scope="session")
def lab(cache, tmp_path_factory):
    """address, token and notebooks of a JupyterLab with copies of the notebooks that use the small demo cache."""
    folder, notebooks = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("notebooks")
    shutil.copytree(cache, notebooks / "cache" / "demo")
    places = {"CACHE_DIR": "cache/demo", "CHECKPOINT_DIR": "checkpoints/demo", "RUN_DIR": "runs/demo"}
    for name in NOTEBOOKS:
        training = {"LEARNING_RATE": RATES[name], "MAX_EPOCHS": 1} if name in RATES else {}
        path = notebooks / f"{name}.ipynb"
        with_parameters(ROOT / path.name, path, places | training | {"LIMIT_QUESTIONS": 48})
    with jupyter_lab(folder, notebooks) as (address, token):
        yield {"address": address, "token": token, "notebooks": notebooks}


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; skips where there is none."""
    from playwright.sync_api import sync_playwright

    if (path := chromium()) is None:
        pytest.skip("no chromium: install it (apt-get install chromium) or name one in $CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    yield page
    page.close()


def sources(notebook: str) -> list[str]:
    return [cell.source for cell in nbformat.read(ROOT / f"{notebook}.ipynb", 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_and_shows_its_figures(notebook, lab, page):
    """In the order of the chain: each one needs what those before it have left."""
    run_all_cells(page, lab["address"], lab["token"], f"{notebook}.ipynb")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{notebook}.png", full_page=True)
    figures = page.locator(".jp-OutputArea-output img")
    expected = sum(bool(re.match(r"(\w+\.)?save_figure\(", source.splitlines()[-1])) for source in sources(notebook))
    assert figures.count() >= expected >= 1
    for figure in figures.all():
        assert figure.evaluate("image => image.complete && image.naturalWidth") > EXPECTED_IN_VIEW
        box = figure.bounding_box()
        assert box and min(box["width"], box["height"]) > EXPECTED_IN_VIEW and box["x"] + box["width"] <= WIDTH
    assert page.locator(".jp-OutputArea-output table").count() >= 1
    assert page.get_by_text("Error displaying widget").count() == 0
    if notebook == "eval_test_dataset_race":
        check_error_browser(page)


def check_error_browser(page) -> None:
    """It is visible, each of its menus parts the questions into groups, and a click opens one."""
    frames = [frame for frame in page.frames if frame.locator("[data-race-browser], .race-browser").count()]
    assert frames, "the error browser is not in the page"
    browser = frames[0].locator("[data-race-browser], .race-browser").first
    browser.scroll_into_view_if_needed()
    assert browser.is_visible()
    cards = browser.locator("details:visible")
    everything = cards.count()
    assert everything > 1
    for menu in browser.locator("select").all():
        choices = menu.locator("option").evaluate_all("options => options.map(option => option.value)")
        assert choices[0] == "" and len(choices) > 1
        counts = []
        for choice in choices[1:]:
            menu.select_option(choice)
            counts.append(cards.count())
        assert sum(counts) == everything
        menu.select_option("")
        assert cards.count() == everything
    cards.first.locator("summary").click()
    assert cards.first.locator("p").first.is_visible()
    page.screenshot(path=SCREENSHOTS / "error-browser.png", full_page=True)
