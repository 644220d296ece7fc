"""RACE as a task: options of a question, two levels, three splits. Constants and the error class of the package."""

import os
import re
import signal
import sys
from pathlib import Path

# Every step has another number of tokens: blocks of rounded sizes are used again, instead of ever more being reserved.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "roundup_power2_divisions:4"  # read when CUDA starts
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace")  # an output that is not UTF-8 has no "─"

LETTERS = [*"ABCDEFGH"]  # of the options of a question, two to eight
OPTIONS = 4  # of RACE; the number of another exam is in its cache
LEVELS = ("middle", "high")
CHAIN = {"e1": "ex01", "e2": "ex02", "e3": "ex03"}  # stages and their notebooks; each starts from the one before
COLUMNS = ("article", "question", "options", "answer", "id", "level")  # of a question, which --columns may name
SPLITS = ("train", "validation", "test")
MONITORS = ("val_loss_epoch", "val_acc")  # what picks the best checkpoint: the lowest loss, or the highest accuracy
RACE_QUESTIONS = {"train": 87866, "validation": 4887, "test": 4934}  # Lai et al. 2017, arXiv:1704.04683
MAX_LEN, MAX_QA_LEN = 512, 128  # tokens of a sequence, and of its question+option
ROOT = Path(__file__).resolve().parent.parent  # of the repository
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # of a cluster, or a user: save and end
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # name or owner/name on the Hugging Face hub


class RaceError(ValueError):
    """Something that the user can fix: the message says what is wrong, where, and what to do."""

    def _render_traceback_(self) -> list[str]:  # in Jupyter, that sentence alone
        return [f"{type(self).__name__}: {self}"]


class Interrupted(KeyboardInterrupt):
    """Training that the stop button ended, with its state saved."""

    _render_traceback_ = RaceError._render_traceback_
