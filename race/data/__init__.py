"""From a source to batches: sources → encoding → cache → module (the data module) → batches."""

import importlib

ROOMS = {
    "batches": ["collate"],
    "cache": ["Cache", "build_cache", "open_cache"],
    "module": ["RaceDataModule", "RaceDataset"],
    "seen": ["seen_before", "seen_articles"],
}
HOMES = {name: f"race.data.{room}" for room, names in ROOMS.items() for name in names}


def __getattr__(name: str):
    """What other rooms use, such as `from race.data import RaceDataModule`; torch is loaded only where it is needed."""
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'race.data' has no attribute {name!r}")
