"""The packed loader: shapes, truncation, orders that depend on (seed, epoch) only, and a light setup()."""

import itertools
import json
import pickle
import time

import numpy as np
import psutil
import pytest
import torch
from kill import in_a_process

from race import RaceError
from race.data.batches import ShuffledBatches, collate
from race.data.cache import build_cache
from race.data.module import RaceDataModule, RaceDataset


def test_collate_packs_without_padding():
    items = [
        {
            "input_ids": [np.array(ids) for ids in ([2, 7, 3], [2, 3], [2, 8, 9, 3], [2])],
            "token_type_ids": [np.array(ids) for ids in ([0, 0, 1], [0, 1], [0, 0, 1, 1], [0])],
            "label": 2,
            "example_id": "x",
        }
    ]
    batch = collate(items)
    assert batch.input_ids.tolist() == [2, 7, 3, 2, 3, 2, 8, 9, 3, 2]
    assert batch.token_type_ids.tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 1, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 10] and batch.cu_seqlens.dtype == torch.int32
    assert batch.labels.tolist() == [2] and batch.lengths == [3, 2, 4, 1]
    assert (len(batch), batch.max_seqlen) == (1, 4)


def test_the_longest_of_a_batch_come_first_for_models_that_pad(cache):
    data = RaceDataModule(cache, batch_size=8)
    plain = list(data.train_dataloader().batch_sampler)
    data.longest_first = True
    by_length, longest = list(data.train_dataloader().batch_sampler), data.train_dataset.lengths().max(1)
    assert [sorted(batch) for batch in by_length] == [sorted(batch) for batch in plain] and by_length != plain
    assert all((np.diff(longest[batch]) <= 0).all() for batch in by_length)


def test_micro_batches_cover_the_batch_within_the_budget(items):
    batch = collate(items(9))
    parts = list(batch.micro_batches(200))
    assert len(parts) > 2
    assert all(sum(part.lengths) <= 200 or len(part) == 1 for part in parts)
    assert torch.cat([part.input_ids for part in parts]).equal(batch.input_ids)
    assert torch.cat([part.position_ids for part in parts]).equal(batch.position_ids)
    assert torch.cat([part.labels for part in parts]).equal(batch.labels)
    assert all(part.cu_seqlens.tolist() == np.concatenate(([0], np.cumsum(part.lengths))).tolist() for part in parts)
    assert [len(part) for part in batch.micro_batches(1)] == [1] * 9
    assert [len(part) for part in batch.micro_batches(None)] == [9]


def test_items_match_their_text(cache):
    dataset = RaceDataset(cache, "train")
    item, text = dataset[3], dataset.text(3)
    assert set(item) == {"input_ids", "token_type_ids", "label", "example_id"}
    assert (item["label"], item["example_id"]) == (text["label"], text["example_id"])
    columns = dataset.columns()
    for i in (0, 3, len(dataset) - 1):
        text = dataset.text(i)
        assert all(columns[name][i] == text[name] for name in ("example_id", "level", "question_index", "label"))


def test_order_is_a_function_of_seed_and_epoch():
    def batches(seed: int, epoch: int) -> list[list[int]]:
        return list(ShuffledBatches(70, 32, seed, epoch))

    first = batches(0, 0)
    assert first == batches(0, 0) and first not in (batches(0, 1), batches(1, 0)) and batches(0, 1) != batches(1, 0)
    assert [len(batch) for batch in first] == [32, 32, 6]
    assert sorted(itertools.chain(*first)) == list(range(70))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_question_once_an_epoch(cache, workers):
    data = RaceDataModule(cache, batch_size=8, num_workers=workers)
    loader = data.train_dataloader()
    loader.batch_sampler.epoch = 3
    expected = [data.train_dataset[i]["label"] for i in itertools.chain(*loader.batch_sampler)]
    batches = list(loader)
    assert torch.cat([batch.labels for batch in batches]).tolist() == expected
    assert len(batches) == len(loader) and len(expected) == len(data.train_dataset)


def test_evaluation_order_is_longest_first_and_complete(cache):
    data = RaceDataModule(cache, batch_size=4)
    totals = np.concatenate([np.reshape(batch.lengths, (-1, 4)).sum(1) for batch in data.ordered_loader("test")])
    assert (np.diff(totals) <= 0).all()
    assert sorted(data.test_dataset.length_order()) == list(range(len(data.test_dataset)))


def test_facts_by_hand(tmp_path):
    """Two passages in the test split, one of which is in train too."""
    shared = {"article": "Ada went to the park. " * 6, "questions": ["Why?"], "options": [list("abcd")]}
    own = {"article": "Ben came home by bus.", "questions": ["Ben came home _ .", "Which is NOT true?"]}
    own["options"] = [["by bus", "by a big boat", "on foot", "by taxi"], ["aaa", "bb", "ccc", "d"]]
    for place, record in (("train/high/1", shared), ("test/high/2", shared), ("test/middle/1", own)):
        path = tmp_path / "source" / f"{place}.txt"
        path.parent.mkdir(parents=True)
        answers = ["A"] * len(record["questions"])
        path.write_text(json.dumps(record | {"answers": answers, "id": path.name}))
    build_cache(str(tmp_path / "source"), "demo", tmp_path / "cache")
    dataset = RaceDataset(tmp_path / "cache", "test", max_len=40)
    facts = dataset.facts()
    assert dataset.columns()["level"].tolist() == ["high", "middle", "middle"]
    assert facts["question"].tolist() == ["Why?", "Ben came home _ .", "Which is NOT true?"]
    assert facts["article_tokens"].tolist() == [36, 6, 6]
    assert facts["truncated"].tolist() == [True, False, False]
    assert len(set(dataset.article_hashes()[1:])) == 1 != len(set(dataset.article_hashes()))
    assert dataset.article_hashes()[0] == RaceDataset(tmp_path / "cache", "train").article_hashes()[0]
    sample = RaceDataset(tmp_path / "cache", "test", max_len=40, rows=np.array([0, 2])).facts()
    assert sample["question"].tolist() == ["Why?", "Which is NOT true?"]
    assert sample["truncated"].tolist() == [True, False]


def test_limit_is_a_seeded_sample(cache):
    rows = [RaceDataModule(cache, limit_questions=10, seed=seed).dataset("train").rows for seed in (0, 0, 1)]
    assert len(rows[0]) == 10 and np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[0], rows[2])
    limited, whole = RaceDataset(cache, "train", rows=rows[0]), RaceDataset(cache, "train")
    assert limited.text(4) == whole.text(rows[0][4])
    assert limited.columns()["label"][4] == whole[rows[0][4]]["label"]
    with pytest.raises(IndexError):
        limited[10]


def test_a_dataset_can_be_sent_to_a_worker(cache):
    dataset = RaceDataset(cache, "test", 64)
    again = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 2000
    assert all(map(np.array_equal, again[5]["input_ids"], dataset[5]["input_ids"]))


def test_missing_split_and_bad_parameters(corpus, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train").symlink_to(corpus / "train" / "high")
    build_cache(str(tmp_path / "source"), "demo", tmp_path / "cache")
    data = RaceDataModule(tmp_path / "cache")
    data.setup()
    assert data.train_dataset is not None and data.val_dataset is None and data.test_dataset is None
    with pytest.raises(RaceError, match="no validation split"):
        data.val_dataloader()
    with pytest.raises(RaceError, match="manifest.json: not found"):
        RaceDataModule(tmp_path / "nothing")
    with pytest.raises(RaceError, match="BATCH_SIZE is 0.*LIMIT_QUESTIONS is -2.*SEED is -1"):
        RaceDataModule(tmp_path / "cache", batch_size=0, limit_questions=-2, seed=-1)
    with pytest.raises(RaceError, match="MAX_LEN is 4, expected 5 or more"):
        RaceDataModule(tmp_path / "cache", max_len=4).setup()


def test_setup_is_light_on_real_data(real_cache, tmp_path):
    """Under 0.5 CPU seconds and 50 MB of new resident memory on 52,171 questions, in a process of its own."""

    def measured() -> None:
        rss, start = psutil.Process().memory_info().rss, time.process_time()
        RaceDataModule(real_cache).setup()
        found = time.process_time() - start, (psutil.Process().memory_info().rss - rss) / 1e6
        (tmp_path / "found").write_text(json.dumps(found))

    in_a_process(measured).join(60)
    seconds, megabytes = json.loads((tmp_path / "found").read_text())
    assert seconds < 0.5 and megabytes < 50
