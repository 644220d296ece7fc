"""Which articles a checkpoint was trained or selected on: their hashes travel in its lineage."""

import base64

import numpy as np

COLUMNS = {"train": "article_in_train", "validation": "article_in_validation"}  # what a column of `seen` is about


def seen_articles(data, before: dict | None) -> dict:
    """Articles of RaceDataModule `data` and of the stages before: {"train": hashes, "validation": hashes, "complete"}.

    before: the same of the base; None if that does not say, and so this is not complete; {} if it was trained on none.
    """
    known = {}
    for split in COLUMNS:
        hashes = np.union1d(data.dataset(split).article_hashes(), _unpacked((before or {}).get(split, "")))
        known[split] = base64.b64encode(hashes.astype("<u8").tobytes()).decode()
    return known | {"complete": before is not None and before.get("complete", True)}


def seen_before(lineage: dict, dataset) -> dict[str, np.ndarray]:
    """[N] article_in_train, article_in_validation: is the article of a question one that trained, or chose, a model?

    None: not known. lineage: of a checkpoint; one without hashes, of the cache's source, had the cache's own splits.
    """
    articles, cache = lineage.get("articles"), dataset.cache
    known, complete = {}, bool(articles and articles["complete"])
    if articles:
        known = {split: _unpacked(articles[split]) for split in COLUMNS}
    elif (lineage.get("cache") or {}).get("source_sha256") == cache.identity["source_sha256"]:
        held = [split for split in COLUMNS if split in cache.splits]
        known = {split: type(dataset)(cache, split).article_hashes() for split in held}
        complete = not lineage.get("chain")  # what the stages before were trained on is not recorded
    own, found = dataset.article_hashes(), {}
    for split, column in COLUMNS.items():
        there = np.isin(own, known.get(split, np.array([], np.uint64)))
        found[column] = np.where(there, True, False if complete and split in known else None)
    return found


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u8")
