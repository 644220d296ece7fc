"""What checkpoints answer, and what follows from it; `recipe_difference` compares two recipes over their seeds."""

import sys

GONE = {
    "race.score.answers": "set QUESTIONS in eval_test_dataset_race.ipynb, which answers them",
    "race.score.seeds": "run python -m race.chain NAME --seeds 1 2 3, which compares the stages over seeds at its end",
}

for module, instead in GONE.items():
    if sys.orig_argv[1:3] == ["-m", module]:
        sys.exit(f"{module} is gone: {instead}")


def __getattr__(name: str):
    if name != "recipe_difference":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from race.score.comparison import recipe_difference  # when it is asked for: it needs SciPy

    return recipe_difference
