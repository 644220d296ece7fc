"""A small corpus in the layout of RACE.tar.gz: template stories, written anew from a seed.

`middle`: one person; one option is mentioned. `high`: three friends; two to four are: one has to read who did what.
"""

import json
import random
import re
from pathlib import Path

from race import LETTERS

SOURCE = Path(__file__).with_name("stories.json").read_text(encoding="utf-8")
TEXTS = json.loads(SOURCE)
FACTS, STORIES, DEEDS, FRIENDS = (TEXTS[name] for name in ("facts", "stories", "deeds", "friends"))
VALUES = {"name": TEXTS["girls"] + TEXTS["boys"]} | TEXTS["values"]


def words() -> list[str]:
    """Every lower-case word that a corpus of any seed can contain, sorted."""
    values = json.loads(SOURCE, object_pairs_hook=lambda pairs: [value for _, value in pairs])  # without the keys
    text = json.dumps(values) + "she he and the"
    return sorted(set(re.findall(r"[a-z]+", re.sub(r"{\w+}", " ", text).lower())))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _ask(rng, text: str, right: str, wrong: list[str]) -> tuple[str, list[str], str]:
    """A question, its options in random order and the letter of the right one."""
    options = rng.sample(wrong, 3)
    label = rng.randrange(4)
    options.insert(label, right)
    if "title" in text:
        options = [re.sub(r"\w+$", lambda word: word[0].capitalize(), option) for option in options]
    elif "_" not in text:
        options = [_capital(option) + "." for option in options]
    return text, options, LETTERS[label]


def _absent(kind: str, mentioned: list[str]) -> list[str]:
    return [value for value in VALUES[kind] if value not in mentioned]


def _middle(rng) -> tuple[str, list]:
    name, pronoun = rng.choice([(n, "she") for n in TEXTS["girls"]] + [(n, "he") for n in TEXTS["boys"]])
    story = rng.choice(STORIES)
    drawn = {}  # a fact and its value, one of each kind
    for fact in [rng.choice(story["openers"]), *rng.sample(story["body"], 3), rng.choice(story["enders"])]:
        if (kind := FACTS[fact]["kind"]) not in drawn:
            drawn[kind] = fact, rng.choice(VALUES[kind])
    facts, sentences, named = list(drawn.values()), [], False
    for fact, value in facts:
        sentence = rng.choice(FACTS[fact]["sentences"])
        after = "{who}" in sentence and not re.search(r"(for|at|from) {who}", sentence)
        who = pronoun if named and after and rng.random() < 0.7 else name
        named = named or "{who}" in sentence
        sentences.append(_capital(sentence.format(who=who, v=value)) + ".")
    article = " ".join([*sentences, rng.choice(story["last_words"])])

    questions = []
    for fact, value in rng.sample(facts, min(len(facts), rng.choice([3, 4]))):
        kind = FACTS[fact]["kind"]
        text = rng.choice(rng.choice([FACTS[fact]["cloze"], FACTS[fact]["questions"]]))
        if kind in ("place", "animal", "thing") and rng.random() < 0.15:
            pairs = zip(rng.sample(_absent("name", [name]), 3), rng.sample(_absent(kind, [value]), 3), strict=True)
            titles = [f"{n} and the {v.split()[-1]}" for n, v in [(name, value), *pairs]]
            questions.append(_ask(rng, rng.choice(TEXTS["titles"]), titles[0], titles[1:]))
        elif text.startswith("Who"):
            questions.append(_ask(rng, text.format(v=value), name, _absent("name", [name])))
        else:
            questions.append(_ask(rng, text.format(n=name), value, _absent(kind, [value])))
    return article, questions


def _high(rng) -> tuple[str, list]:
    names = rng.sample(VALUES["name"], 3)
    sentences, questions = [rng.choice(FRIENDS["meetings"]).format(**dict(zip("abc", names, strict=True)))], []
    for kind, several in zip(rng.sample(sorted(DEEDS), 2), rng.choice([(1, 2), (2, 1), (2, 2)]), strict=True):
        deed, real, all_did, none_did = DEEDS[kind].values()
        *values, nobody = rng.sample(VALUES[kind], 4)
        pairs = rng.sample(list(zip(names, values, strict=True)), 3)
        done = [deed.format(v=value) for _, value in pairs]
        slots = dict(zip("abcxyz", [name for name, _ in pairs] + done, strict=True))
        sentences.append(rng.choice(FRIENDS["shapes"]).format(**slots))
        mentioned = values
        if rng.random() < 0.5:
            sentences.append(rng.choice(FRIENDS["nobody"]).format(w=deed.format(v=nobody)))
            mentioned = [*values, nobody]
        for (name, value), draw in zip(rng.sample(pairs, several), (rng.random(), rng.random()), strict=False):
            if draw < 0.12:
                right = rng.choice(_absent(kind, mentioned)) if mentioned == values else nobody
                asked = rng.choice([FRIENDS["except"].format(all=all_did), none_did])
                questions.append(_ask(rng, asked, right, values))
            else:
                is_who = draw > 0.8
                pool, right, known = ("name", name, names) if is_who else (kind, value, mentioned)
                present = [v for v in known if v != right]
                present = rng.sample(present, rng.choice([1, 1, 2, 3][: len(present) + 1]))  # 2 to 4 with the right one
                wrong = present + rng.sample(_absent(pool, known), 3 - len(present))
                asked = [text.format(deed=deed.format(v=value)) for text in FRIENDS["who"]]
                if not is_who:
                    asked = [f"{name} {deed.format(v='_')} .", real.format(n=name)]
                questions.append(_ask(rng, rng.choice(asked), right, wrong))
    return " ".join(sentences), questions


def write_corpus(folder, seed: int = 0, train: int = 1600, dev: int = 160, test: int = 320) -> None:
    """Write `{train,dev,test}/{middle,high}/*.txt` under `folder`; the counts are passages, 3 in 5 of them middle."""
    for split, count in (("train", train), ("dev", dev), ("test", test)):
        for level, write, passages in (("middle", _middle, count * 3 // 5), ("high", _high, count - count * 3 // 5)):
            rng = random.Random(f"{seed}/{split}/{level}")
            path = Path(folder) / split / level
            path.mkdir(parents=True, exist_ok=True)
            for i in range(1, passages + 1):
                article, rows = write(rng)
                rows = [row for number, row in enumerate(rows) if row not in rows[:number]]  # the same draw twice
                texts, options, answers = zip(*rows, strict=True)
                passage = {"answers": answers, "options": options, "questions": texts, "article": article}
                passage["id"] = f"{level}{i}.txt"
                (path / f"{i}.txt").write_bytes(json.dumps(passage).encode())
