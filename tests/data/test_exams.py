"""Other exams than RACE: the number of options, names of columns, answers, and sources without passages."""

import json

import numpy as np
import pandas as pd
import pytest
from small_stage import e1, stage

from generate_race_cache import main as generate_race_cache
from race import RaceError
from race.data import Cache, RaceDataModule, RaceDataset
from race.data.passages import read_source
from race.report import sentences
from race.score.predictions import answer_question, save_answers, score
from race.score.statistics import group_accuracies, letters_of

THREE = ["park", "zoo", "farm"]
FIVE, ENDINGS = ["park", "zoo", "farm", "lake", "school"], ["ending0", "ending1", "ending2", "ending3"]
# what a line of each looks like (numbered), how the command reads it, and how many options it has
EXAMS = {
    "DREAM": (
        lambda n: [
            [f"W: Day {n}.", "M: Yes."],
            [{"question": "Where?", "choice": THREE, "answer": THREE[n % 3]}],
            f"5-{n}",
        ],
        [],
        3,
    ),
    "CommonsenseQA": (
        lambda n: {
            "id": f"c{n}",
            "question": {"stem": f"Where do {n} boats lie?", "choices": [{"label": "x", "text": it} for it in FIVE]},
            "answerKey": "ABCDE"[n % 5],
        },
        ["--columns", "article=", "question=question.stem", "options=question.choices.text", "answer=answerKey"],
        5,
    ),
    "ReClor": (
        lambda n: {
            "context": f"Tom has {n}.",
            "question": "Who?",
            "answers": FIVE[:4],
            "label": n % 4,
            "id_string": str(n),
        },
        ["--columns", "article=context", "options=answers", "answer=label", "id=id_string", "--answers=0"],
        4,
    ),
    "SWAG": (
        lambda n: {"sent1": f"Ada runs {n}.", "sent2": "She", "label": n % 4, **dict(zip(ENDINGS, FIVE, strict=False))},
        ["--columns", "article=sent1", "question=sent2", f"options={','.join(ENDINGS)}", "answer=label", "--answers=0"],
        4,
    ),
}


@pytest.fixture(params=EXAMS)
def exam(request, tmp_path):
    """(options, cache) of an exam of 24 questions in each of its splits."""
    line, arguments, options = EXAMS[request.param]
    (tmp_path / "source").mkdir()
    for split, first in (("train", 0), ("dev", 24)):
        lines = [line(number) for number in range(first, first + 24)]
        (tmp_path / "source" / f"{split}.json").write_text(json.dumps(lines))
    out = tmp_path / "cache"
    assert not generate_race_cache([f"--source={tmp_path / 'source'}", "--model=demo", f"--out={out}", *arguments])
    return options, Cache(out)


def test_every_sequence_is_the_tokenizers_own(exam):
    """A pair; without passages a single text."""
    options, cache = exam
    dataset = RaceDataset(cache, "validation")
    assert cache.options == options and len(dataset) == 24
    for row in range(3):
        item, text = dataset[row], dataset.text(row)
        texts = [f"{text['question']} {option}" for option in text["options"]]
        given = (texts,) if not text["article"] else ([text["article"]] * options, texts)
        theirs = cache.tokenizer(*given, return_token_type_ids=True)
        assert [ids.tolist() for ids in item["input_ids"]] == theirs["input_ids"]
        assert [kinds.tolist() for kinds in item["token_type_ids"]] == theirs["token_type_ids"]
    assert dataset.columns()["label"].tolist()[:4] == [(24 + n) % options for n in range(4)]
    assert len(set(dataset.article_hashes())) == 24  # of no articles, of the questions


def test_a_stage_and_its_numbers(exam, tmp_path):
    """Logits equal Hugging Face's; chance, letters and columns are those of the exam; typed and asked questions."""
    options, cache = exam
    stage(tmp_path, cache, epochs=1, data={"limit_questions": 16})
    data, checkpoint = RaceDataModule(cache), e1(tmp_path).best()
    found = score(checkpoint, data, "validation", tmp_path / "run", accelerator="cpu")
    assert letters_of(found.table) == [*"ABCDEFGH"[:options]] and found.results["options"].eq(options).all()
    chance = {3: "33.3 %", 4: "25 %", 5: "20 %"}[options]
    assert f"chance ({chance}) is " in sentences.headline(found.results)
    typed = answer_question(checkpoint, data, "In the park.", "Where?", FIVE[:options])
    if not cache.template.between:  # an article would be glued to the question
        assert typed.equals(answer_question(checkpoint, data, "", "Where?", FIVE[:options]))
    assert typed["letter"].tolist() == [*"ABCDEFGH"[:options]] and typed["probability"].sum() == pytest.approx(1)
    asked = save_answers(checkpoint, str(tmp_path / "source" / "dev.json"), data, tmp_path / "out", accelerator="cpu")
    np.testing.assert_allclose(asked.filter(like="p_"), found.table.filter(regex="^p_"), atol=1e-5)
    if options == 3:
        two = {"article": "a", "id": "1", "questions": ["Who?"], "options": [["x", "y"]], "answers": ["A"]}
        (tmp_path / "two.json").write_text(json.dumps(two))
        with pytest.raises(RaceError, match="2 options a question; .* has 3"):
            save_answers(checkpoint, str(tmp_path / "two.json"), data, tmp_path / "out", accelerator="cpu")


def test_numbers_of_options_that_vary_are_refused_by_place(tmp_path):
    lines = [EXAMS["DREAM"][0](number) for number in range(4)]
    lines[2][1][0]["choice"] = FIVE
    (tmp_path / "train.json").write_text(json.dumps(lines))
    with pytest.raises(RaceError, match=r"train.json, item 3: expected a list of 3 options \(as most"):
        read_source(str(tmp_path))


def test_articles_that_are_all_blank_are_no_source_without_passages(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("article,question,A,B,answer\r\n,Who?,Tom,Ann,A\r\n")
    command = [f"--source={tmp_path}", "--model=demo", f"--out={tmp_path / 'out'}"]
    assert generate_race_cache(command) == 1 and "row 2: article: " in capsys.readouterr().err
    assert generate_race_cache([*command, "--columns", "article="]) == 0
    for wrong in (["article"], ["article=a", "article=b"], ["text=a"]):
        with pytest.raises(SystemExit):
            generate_race_cache([*command, "--columns", *wrong])


def test_an_unknown_column_is_named(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("context,question,A,B,answer\r\nTom ran.,Who?,Tom,Ann,2\r\n")
    command = [f"--source={tmp_path}", "--model=demo", f"--out={tmp_path / 'out'}", "--columns"]
    assert generate_race_cache([*command, "article=text"]) == 1
    said = capsys.readouterr().err
    assert "'context', 'question'" in said and "--columns says what stands for them" in said
    assert generate_race_cache([*command, "article=context", "question=qestion"]) == 1  # although there is a question
    assert "expected the columns qestion;" in capsys.readouterr().err
    assert generate_race_cache([*command, "article=context", "--answers=1"]) == 0
    assert "2 options a question" in capsys.readouterr().out
    assert RaceDataset(tmp_path / "out", "train")[0]["label"] == 1


def test_columns_that_go_along_group_the_accuracy(tmp_path, capsys):
    """Of a table and of records; into the predictions, and from there into groups; a question without them is named."""
    for split, count in (("train", 8), ("test", 12)):
        rows = [f"Tom ran {i}.,Who ran?,Tom,Ann,A,{'tale' if i % 3 else 'news'},{i}" for i in range(count)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["article,question,A,B,answer,genre,year", *rows]) + "\n")
    command = [f"--source={tmp_path}", "--model=demo", f"--out={tmp_path / 'out'}", "--keep", "genre"]
    assert generate_race_cache([*command, "author"]) == 1 and "expected the columns author" in capsys.readouterr().err
    for taken in ("level", "id", "options", "sequence", "question_index"):
        with pytest.raises(SystemExit):
            generate_race_cache([*command, taken])
    assert generate_race_cache(command) == 0
    facts = RaceDataset(tmp_path / "out", "test", rows=np.array([0, 4, 5])).facts()
    assert list(facts["genre"]) == ["news", "tale", "tale"] and "year" not in facts
    record = {"article": "Tom ran.", "questions": ["Who?", "How?"], "options": [["Tom", "Ann"], ["on", "by"]]}
    record |= {"answers": ["A", "B"], "id": "1", "genre": 7, "skill": ["infer", None]}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.json").write_text(json.dumps(record))
    command[0], command[2] = f"--source={tmp_path / 'more'}", f"--out={tmp_path / 'second'}"
    assert generate_race_cache([*command, "author"]) == 1
    assert "train.json: --keep author: it has only article, questions, options" in capsys.readouterr().err
    assert generate_race_cache([*command, "skill"]) == 0
    assert RaceDataset(tmp_path / "second", "train").facts()[["genre", "skill"]].values.tolist() == [
        ["7", "infer"],
        ["7", ""],
    ]
    answered = facts.assign(answer="A", prediction=["A", "B", "A"], level="", example_id=["a", "b", "c"], kind="who")
    answered = answered.assign(article_in_train=pd.array([False] * 3, "boolean"), p_A=0.5, p_B=0.5)
    groups = group_accuracies(answered, ["genre"]).query("grouping == 'genre'")
    assert list(groups["group"]) == ["news", "tale"] and list(groups["accuracy"]) == [1.0, 0.5]
    with pytest.raises(RaceError, match="GROUP_BY: no column year"):
        group_accuracies(answered, ["year"])
