"""The cards of questions: what is shown, in which order, and that no text of the data becomes markup."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from predictions import made, random_predictions

from race import RaceError
from race.data import RaceDataModule
from race.data.cache import build_cache
from race.data.module import RaceDataset
from race.report.error_browser import browsed_rows, error_browser


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> RaceDataset:
    """Two questions whose every text holds markup."""
    folder = tmp_path_factory.mktemp("markup")
    record = {
        "article": "Ada wrote <script>alert(1)</script> & left.",
        "questions": ["What did <b>Ada</b> write?", "Who _ ?"],
        "options": [["</details>", "a < b", '"quoted"', "none"], ["Ada", "Ben", "<img src=x>", "Tom"]],
        "answers": ["B", "A"],
        "id": '1".txt',
    }
    path = folder / "source" / "test" / "high" / "1.txt"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    build_cache(str(folder / "source"), "demo", folder / "cache")
    return RaceDataset(folder / "cache", "test")


@pytest.fixture
def predictions() -> pd.DataFrame:
    """The first answered wrongly, with A at 90 %; the second rightly, with A at 60 %."""
    table = made("BA", "AA", [0.9, 0.6], levels=["high"] * 2, kind=["what", "cloze"])
    return table.assign(example_id='1".txt')


def cards(html: str) -> list[str]:
    return re.findall(r"<details.*?</details>", html, re.DOTALL)


def test_texts_are_shown_and_never_become_markup(dataset, predictions):
    html = error_browser(predictions, dataset).data
    assert html.count("<script>") == 1 and "<img" not in html and "<b>" not in html
    assert len(cards(html)) == html.count("</details>") == 2
    assert "Ada wrote &lt;script&gt;alert(1)&lt;/script&gt; &amp; left." in html
    assert "&quot;quoted&quot;" in html and "1&quot;.txt, question 1" in html


def test_a_card_says_what_was_chosen_and_what_is_correct(dataset, predictions):
    wrong, right = cards(error_browser(predictions, dataset).data)
    assert 'data-answer="wrong" data-level="high" data-kind="what" data-confidence="90 % and more"' in wrong
    assert "chosen: “&lt;/details&gt;”, correct: “a &lt; b”" in wrong and "90.0 %" in wrong
    assert re.search(r"A\. &lt;/details&gt; — <strong>chosen</strong>", wrong)
    assert re.search(r"B\. a &lt; b — <strong>correct answer</strong>", wrong) and "width: 3.3%" in wrong
    assert 'data-answer="correct"' in right and 'data-confidence="50 to 90 %"' in right and "chosen: “" not in right
    assert "A. Ada — <strong>correct answer, chosen</strong>" in right


def test_filters_come_with_the_script(dataset, predictions):
    """Without the script there are none: menus that do nothing would mislead."""
    before, script = error_browser(predictions, dataset).data.split("<script>")
    assert '<div class="race-filters"></div>' in before and "<select" not in before
    assert re.search(r'data-race-browser="(\w+)"', before)[1] in script and "NAME" not in script


def test_mistakes_come_first_and_the_most_confident_are_always_there():
    predictions = random_predictions(400)
    right = (predictions["answer"] == predictions["prediction"]).to_numpy()
    sure = predictions[["p_A", "p_B", "p_C", "p_D"]].max(axis=1).to_numpy()
    rows = browsed_rows(predictions, 30, 12)
    assert len(set(rows)) == 42 and not right[rows[:30]].any() and right[rows[30:]].all()
    assert (np.diff(sure[rows[:30]]) <= 0).all() and (np.diff(sure[rows[30:]]) >= 0).all()
    surest = np.flatnonzero(~right)[np.argsort(-sure[~right])][:10]
    assert rows[:10].tolist() == surest.tolist()
    assert browsed_rows(predictions, 30, 12).tolist() == rows.tolist()
    assert len(browsed_rows(predictions, 1000, 1000)) == 400


def test_questions_of_another_sample_are_refused(cache):
    chosen = RaceDataModule(cache, limit_questions=6, seed=1).dataset("test")
    columns = {name: values for name, values in chosen.columns().items() if name != "label"}
    predictions = made("AAAAAA", "BBBBBB").assign(**columns, kind="other")
    assert "6 of 6 mistakes and 0 of 0 correct answers" in error_browser(predictions, chosen).data
    with pytest.raises(RaceError, match="LIMIT_QUESTIONS and SEED"):
        error_browser(predictions, RaceDataModule(cache, limit_questions=6, seed=2).dataset("test"))
