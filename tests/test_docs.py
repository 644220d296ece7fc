"""What the docs say of the code is what the code says, and their links lead somewhere."""

import re

import pytest
from helpers import ROOT

from race.parameters import table

PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_parameters_is_that_of_the_code():
    page = (ROOT / "docs" / "parameters.md").read_text()
    assert re.search(r"<!-- table -->\n(.*)\n<!-- end -->", page, re.DOTALL)[1] == table()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
