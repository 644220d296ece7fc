"""A small corpus in the layout of RACE.tar.gz: template stories, written anew from a seed.

`middle`: a story about one person; exactly one of the four options is mentioned in it.
`high`: a story about three friends; two to four options are mentioned, so one has to read who did what.
"""

import json
import random
import re
from pathlib import Path

GIRLS = "Ada Clara Emma Freya Ines Lily Mia Nora Rosa Tess Uma Zoe".split()
BOYS = "Ali Ben Carl Dino Emil Hugo Jack Leo Milo Otto Sam Tom".split()

# fmt: off
VALUES = {
    "name": GIRLS + BOYS,
    "place": ["the " + w for w in
              "bakery beach castle farm harbour lake library market museum park school zoo".split()],
    "animal": ["a " + w for w in "bear camel duck fox frog goat hen parrot pony snail".split()]
    + ["an otter", "an owl"],
    "thing": ["a " + w for w in "basket bell drum kettle kite ladder lamp map mirror rope teapot".split()]
    + ["an umbrella"],
    "food": "apples bread cheese cherries honey noodles pancakes pears pie rice salad soup".split(),
    "job": ["a " + w for w in "barber clown cook dentist doctor driver gardener nurse pilot tailor".split()]
    + ["an actor", "an engineer"],
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "number": "three four five six seven eight nine ten eleven twelve".split(),
    "weather": "cloudy cold dry foggy hot rainy snowy stormy sunny windy".split(),
    "colour": "black blue brown green grey pink purple red white yellow".split(),
    "travel": "by bus,by bike,by boat,by train,by taxi,by tram,on skates,on foot".split(","),
    "mood": "angry bored brave calm happy hungry lonely nervous proud sleepy".split(),
    "reason": "the bridge was closed,the clock had stopped,a wheel was broken,the key was gone,a shoe was missing,"
    "the stairs were wet,the letter came too soon,the neighbours sang all night,a tree had fallen".split(","),
}

# middle: fact -> (kind of value, sentences, cloze questions, questions); {who} is the name or a pronoun
FACTS = {
    "go": ("place", ["in the morning {who} went to {v}", "{who} spent the morning at {v}"],
           ["{n} went to _ .", "In the morning {n} was at _ ."],
           ["Where did {n} go?", "Which place did {n} visit?", "Who went to {v}?"]),
    "ride": ("travel", ["{who} came home {v}", "{who} went back {v}"],
             ["{n} came home _ ."], ["How did {n} come home?"]),
    "buy": ("thing", ["{who} bought {v} from an old man", "for two coins {who} bought {v}"],
            ["{n} paid for _ .", "{n} bought _ from an old man."],
            ["What did {n} buy?", "Who bought {v}?"]),
    "find": ("thing", ["under a bench {who} found {v}", "{who} sat down and found {v} in the grass"],
             ["{n} was surprised to find _ ."], ["What did {n} find?", "Who found {v}?"]),
    "meet": ("animal", ["on the way {who} met {v} with muddy feet", "{v} looked at {who} and would not move"],
             ["On the way {n} met _ ."], ["Which animal did {n} meet?", "Who met {v}?"]),
    "lose": ("animal", ["{who} called and called, for {v} had run away", "{who} was looking for {v}"],
             ["{n} was looking for _ ."], ["What was {n} looking for?", "Who was looking for {v}?"]),
    "eat": ("food", ["{who} ate {v} and asked for more", "for lunch {who} had {v}, and then some more"],
            ["For lunch {n} had _ .", "{n} asked for more _ ."], ["What did {n} eat?", "Who ate {v}?"]),
    "work": ("job", ["{who} works as {v} and talks about it all the time", "{who} was {v} for one day"],
             ["{n} worked as _ ."], ["What is the job of {n}?", "Who works as {v}?"]),
    "dream": ("job", ["one day {who} wants to be {v}", "{who} dreams of becoming {v}"],
              ["{n} hopes to become _ ."], ["What does {n} want to be?", "Who wants to be {v}?"]),
    "when": ("day", ["all this was on {v}", "it was {v}, and nobody was in a hurry"],
             ["The story takes place on _ ."], ["When did this happen?", "On which day did this happen?"]),
    "count": ("number", ["{who} counted {v} stars", "at night {who} could see {v} stars"],
              ["{n} could see _ stars.", "There were _ stars that night."], ["How many stars did {n} see?"]),
    "age": ("number", ["{who} is {v} years old and likes to say so", "{who} was {v} years old that week"],
            ["{n} is _ years old."], ["How old is {n}?", "Who is {v} years old?"]),
    "sky": ("weather", ["the weather was {v}, as always", "it was a {v} day"],
            ["It was a _ day.", "The weather was _ ."], ["What was the weather like?"]),
    "wear": ("colour", ["{who} wore a {v} hat", "the wind took a {v} hat from {who}"],
             ["The hat was _ ."], ["What colour was the hat?", "Who wore a {v} hat?"]),
    "late": ("reason", ["{who} was late because {v}", "{v}, so {who} was late"],
             ["{n} was late because _ ."], ["Why was {n} late?"]),
    "feel": ("mood", ["{who} felt {v} and went to bed", "at the end {who} was very {v}"],
             ["At the end {n} felt _ ."], ["How did {n} feel at the end?", "Who felt {v}?"]),
}

# a story: facts that may open it, facts that may follow in any order, facts that may end it, last words
STORIES = [
    (["go", "sky"], ["buy", "meet", "eat", "late", "wear"], ["ride", "feel"], ["What a trip!", "A good day."]),
    (["lose", "when"], ["go", "late", "sky", "find"], ["eat", "feel", "count"], ["All was well again.", "Good night!"]),
    (["age", "dream"], ["eat", "buy", "meet", "wear"], ["count", "when"], ["Everyone laughed.", "Nobody knows why."]),
    (["work", "late"], ["wear", "meet", "eat", "when", "find"], ["feel", "ride"], ["What a life!", "So it goes."]),
]

# high: kind of value -> (what each friend did, a question about it, what all did, a question about what none did)
DEEDS = {
    "place": ("went to {v}", "Where did {n} go?", "went to all of these", "Where did the friends NOT go?"),
    "thing": ("bought {v}", "What did {n} buy?", "bought all of these", "What did the friends NOT buy?"),
    "animal": ("met {v}", "Which animal did {n} meet?", "met all of these", "Which animal did the friends NOT meet?"),
    "food": ("ate {v}", "What did {n} eat?", "ate all of these", "What did the friends NOT eat?"),
    "job": ("worked as {v}", "What was the job of {n}?", "had all of these jobs",
            "Which job did the friends NOT have?"),
    "number": ("saw {v} stars", "How many stars did {n} see?", "saw all of these numbers of stars",
               "How many stars did the friends NOT see?"),
    "day": ("came on {v}", "When did {n} come?", "came on all of these days", "On which day did the friends NOT come?"),
    "travel": ("came home {v}", "How did {n} come home?", "came home in all of these ways",
               "How did the friends NOT come home?"),
    "colour": ("wore a {v} hat", "What colour was the hat of {n}?", "had hats in all of these colours",
               "Which colour was NOT the colour of a hat?"),
}
MEETINGS = ["{a}, {b} and {c} are old friends.", "This is the story of {a}, {b} and {c}.", "{a} knows {b} and {c}."]
SHAPES = ["{a} {x}, {b} {y} and {c} {z}.", "{a} {x}. {b}, you see, {y}, but {c} {z}.", "{a} {x} and {b} {y}. {c} {z}."]
WHO = ["It was _ who {deed}.", "Who {deed}?"]
EXCEPT = "The friends {all} EXCEPT _ ."
NOBODY = ["Nobody {w}.", "No one {w}, which is a pity."]
TITLES = ["What is the best title for the story?", "The story is mainly about _ ."]
# fmt: on


def words() -> list[str]:
    """Every lower-case word that a corpus of any seed can contain, sorted."""

    def strings(node):
        if isinstance(node, str):
            yield node
        else:
            for child in node.values() if isinstance(node, dict) else node:
                yield from strings(child)

    tables = [VALUES, FACTS, STORIES, DEEDS, MEETINGS, SHAPES, WHO, EXCEPT, NOBODY, TITLES, "she he and the"]
    text = " ".join(strings(tables))
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
    return text, options, "ABCD"[label]


def _absent(kind: str, mentioned: list[str]) -> list[str]:
    return [value for value in VALUES[kind] if value not in mentioned]


def _middle(rng) -> tuple[str, list]:
    name, pronoun = rng.choice([(n, "she") for n in GIRLS] + [(n, "he") for n in BOYS])
    openers, body, enders, last_words = rng.choice(STORIES)
    facts, used = [], set()
    for fact in [rng.choice(openers), *rng.sample(body, 3), rng.choice(enders)]:
        if FACTS[fact][0] not in used:
            used.add(FACTS[fact][0])
            facts.append((fact, rng.choice(VALUES[FACTS[fact][0]])))
    sentences, named = [], False
    for fact, value in facts:
        sentence = rng.choice(FACTS[fact][1])
        after = "{who}" in sentence and not re.search(r"(for|at|from) {who}", sentence)
        who = pronoun if named and after and rng.random() < 0.7 else name
        named = named or "{who}" in sentence
        sentences.append(_capital(sentence.format(who=who, v=value)) + ".")
    article = " ".join([*sentences, rng.choice(last_words)])

    questions = []
    for fact, value in rng.sample(facts, min(len(facts), rng.choice([3, 4]))):
        kind, _, cloze, real = FACTS[fact]
        text = rng.choice(rng.choice([cloze, real]))
        if kind in ("place", "animal", "thing") and rng.random() < 0.15:
            pairs = zip(rng.sample(_absent("name", [name]), 3), rng.sample(_absent(kind, [value]), 3), strict=True)
            titles = [f"{n} and the {v.split()[-1]}" for n, v in [(name, value), *pairs]]
            questions.append(_ask(rng, rng.choice(TITLES), titles[0], titles[1:]))
        elif text.startswith("Who"):
            questions.append(_ask(rng, text.format(v=value), name, _absent("name", [name])))
        else:
            questions.append(_ask(rng, text.format(n=name), value, _absent(kind, [value])))
    return article, questions


def _high(rng) -> tuple[str, list]:
    names = rng.sample(VALUES["name"], 3)
    sentences, questions = [rng.choice(MEETINGS).format(**dict(zip("abc", names, strict=True)))], []
    for kind, several in zip(rng.sample(sorted(DEEDS), 2), rng.choice([(1, 2), (2, 1), (2, 2)]), strict=True):
        deed, real, all_did, none_did = DEEDS[kind]
        *values, nobody = rng.sample(VALUES[kind], 4)
        pairs = rng.sample(list(zip(names, values, strict=True)), 3)
        slots = dict(zip("abc", [n for n, _ in pairs], strict=True))
        slots |= dict(zip("xyz", [deed.format(v=v) for _, v in pairs], strict=True))
        sentences.append(rng.choice(SHAPES).format(**slots))
        mentioned = values
        if rng.random() < 0.5:
            sentences.append(rng.choice(NOBODY).format(w=deed.format(v=nobody)))
            mentioned = [*values, nobody]
        for (name, value), draw in zip(rng.sample(pairs, several), (rng.random(), rng.random()), strict=False):
            if draw < 0.12:
                right = rng.choice(_absent(kind, mentioned)) if mentioned == values else nobody
                questions.append(_ask(rng, rng.choice([EXCEPT.format(all=all_did), none_did]), right, values))
            else:
                is_who = draw > 0.8
                pool, right, known = ("name", name, names) if is_who else (kind, value, mentioned)
                present = [v for v in known if v != right]
                present = rng.sample(present, rng.choice([1, 1, 2, 3][: len(present) + 1]))  # 2 to 4 with the right one
                wrong = present + rng.sample(_absent(pool, known), 3 - len(present))
                done = deed.format(v=value)
                asked = [text.format(deed=done) for text in WHO]
                if not is_who:
                    asked = [f"{name} {deed.format(v='_')} .", real.format(n=name)]
                questions.append(_ask(rng, rng.choice(asked), right, wrong))
    return " ".join(sentences), questions


def write_corpus(folder, seed: int = 0, train: int = 1600, dev: int = 160, test: int = 320) -> None:
    """Write `{train,dev,test}/{middle,high}/*.txt` under `folder`; the counts are passages, 3 in 5 of them middle."""
    for split, count in (("train", train), ("dev", dev), ("test", test)):
        middle = count * 3 // 5
        for level, write, passages in (("middle", _middle, middle), ("high", _high, count - middle)):
            rng = random.Random(f"{seed}/{split}/{level}")
            path = Path(folder) / split / level
            path.mkdir(parents=True, exist_ok=True)
            for i in range(1, passages + 1):
                article, rows = write(rng)
                texts, options, answers = (list(column) for column in zip(*rows, strict=True))
                passage = {"answers": answers, "options": options, "questions": texts, "article": article}
                passage["id"] = f"{level}{i}.txt"
                (path / f"{i}.txt").write_bytes(json.dumps(passage).encode())
