"""From a source to batches: sources → encoding → cache → module (the data module) → batches."""

import importlib

HOMES = {"RaceDataModule": "race.data.module", "RaceDataset": "race.data.module", "collate": "race.data.batches"}
HOMES |= {"Cache": "race.data.cache", "open_cache": "race.data.cache", "build_cache": "race.data.cache"}


def __getattr__(name: str):
    """What other rooms use, such as `from race.data import RaceDataModule`; torch is loaded only where it is needed."""
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'race.data' has no attribute {name!r}")
