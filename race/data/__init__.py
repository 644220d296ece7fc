"""From a source to batches: sources → encoding → cache → module (the data module) → batches."""

import importlib

HOMES = {"RaceDataModule": "race.data.module", "collate": "race.data.batches"}


def __getattr__(name: str):
    """`from race.data import RaceDataModule, collate`, without loading torch for those who only make a cache."""
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'race.data' has no attribute {name!r}")
