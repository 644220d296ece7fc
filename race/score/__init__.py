"""What checkpoints answer, and what follows from it; `recipe_difference` compares two recipes over their seeds."""

import sys

from race.score.comparison import recipe_difference

__all__ = ["recipe_difference"]

GONE = {
    "race.score.answers": "set QUESTIONS in eval_test_dataset_race.ipynb, which answers them",
    "race.score.seeds": "run python -m race.chain NAME --seeds 1 2 3, which compares the stages over seeds at its end",
}

if instead := GONE.get(module := "".join(sys.orig_argv[2:3])):  # as `python -m race.score.seeds` names it
    sys.exit(f"{module} is gone: {instead}")
