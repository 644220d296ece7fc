"""What checkpoints answer, and what follows from it; `recipe_difference` compares two recipes over their seeds."""

from race.score.comparison import recipe_difference

__all__ = ["recipe_difference"]
