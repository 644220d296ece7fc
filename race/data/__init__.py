"""From a source to batches: sources → encoding → cache → module (the data module) → batches."""

import importlib

HOMES = {"collate": "batches", "RaceDataModule": "module", "RaceDataset": "module", "Cache": "cache"}
HOMES |= {
    "Reading": "sources",
    "build_cache": "cache",
    "open_cache": "cache",
    "seen_before": "seen",
    "seen_articles": "seen",
}


def __getattr__(name: str):
    """What other rooms use, such as `from race.data import RaceDataModule`; torch is loaded only where it is needed."""
    if name in HOMES:
        return getattr(importlib.import_module(f"race.data.{HOMES[name]}"), name)
    raise AttributeError(f"module 'race.data' has no attribute {name!r}")
