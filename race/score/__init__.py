"""What checkpoints answer, and what follows from it; `recipe_difference` compares two recipes over their seeds."""

import sys

from race.score.comparison import recipe_difference

__all__ = ["recipe_difference"]

GONE = {
    "race.score.answers": "set QUESTIONS in eval_test_dataset_race.ipynb, which answers them",
    "race.score.seeds": "run python -m race.chain NAME --seeds 1 2 3, which compares the stages over seeds at its end",
}

for module, instead in GONE.items():
    if sys.orig_argv[1:3] == ["-m", module]:
        sys.exit(f"{module} is gone: {instead}")
