"""From a source to batches: sources → encoding → cache → module (the data module) → batches."""

import importlib

HOMES = {"collate": "batches", "Reading": "sources"} | dict.fromkeys(("RaceDataModule", "RaceDataset"), "module")
HOMES |= dict.fromkeys(("Cache", "build_cache", "open_cache"), "cache")
HOMES |= dict.fromkeys(("seen_before", "seen_articles"), "seen")


def __getattr__(name: str):
    """What other rooms use, such as `from race.data import RaceDataModule`; torch is loaded only where it is needed."""
    if name in HOMES:
        return getattr(importlib.import_module(f"race.data.{HOMES[name]}"), name)
    raise AttributeError(f"module 'race.data' has no attribute {name!r}")
