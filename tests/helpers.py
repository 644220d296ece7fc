"""What several tests need: where things lie, a batch as Hugging Face's models take it, sums written out."""

import json
import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("RACE_TEST_DATA", ROOT.parent / "shared" / "data"))
ALBERT = TEST_DATA / "albert-base-v2"
STAGES = ("ex01", "ex02", "ex03")
RECORD = {  # two questions in RACE's own layout
    "article": "Tom has a dog.",
    "questions": ["What has Tom?", "Tom has _ ."],
    "options": [["a cat", "a dog", "a cow", "a hen"], ["a car", "a hat", "a dog", "a bag"]],
    "answers": ["B", "C"],
    "id": "middle1.txt",
}
NOTEBOOKS = (*STAGES, "eval_test_dataset_race", "eval_test_dataset_race_2")
DOCUMENTS = (*NOTEBOOKS, "compare_recipes")


def notebook_parameters(notebook: str) -> dict:
    """The values in a notebook's own parameters cell."""
    cells = json.loads((ROOT / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    values: dict = {}
    exec(source, values)
    return {name: value for name, value in values.items() if name.isupper()}


def padded(batch, left: bool = False, padding: int = 0) -> dict[str, torch.Tensor]:
    """A PackedBatch as the padded [B, 4, L] tensors that Hugging Face's model takes."""
    shape = len(batch.lengths), batch.max_seqlen
    ids, segments, mask = (torch.full(shape, fill) for fill in (padding, 0, 0))
    for i, (start, length) in enumerate(zip(batch.cu_seqlens.tolist(), batch.lengths, strict=False)):
        row = slice(shape[1] - length, None) if left else slice(0, length)
        ids[i, row] = batch.input_ids[start : start + length]
        segments[i, row] = batch.token_type_ids[start : start + length]
        mask[i, row] = 1
    tensors = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
    return {name: tensor.view(-1, batch.options, shape[1]) for name, tensor in tensors.items()} | {
        "labels": batch.labels
    }


def recipes_by_hand(first, second, passages, levels) -> tuple[float, float, float]:
    """(difference, variance, degrees of freedom), sum by sum, as in the published procedure."""
    seeds, questions = first.shape
    each = [sum(second[:, q]) / seeds - sum(first[:, q]) / seeds for q in range(questions)]
    of_questions, clusters = 0.0, 0
    for level in sorted(set(levels)):
        here = [q for q in range(questions) if levels[q] == level]
        mean, names = sum(each[q] for q in here) / len(here), sorted({passages[q] for q in here})
        squares = sum(sum(each[q] - mean for q in here if passages[q] == name) ** 2 for name in names)
        of_questions += len(names) / (len(names) - 1) * squares / questions**2
        clusters += len(names) - 1
    gains = second - first
    means, grand = [sum(run) / questions for run in gains], gains.sum() / gains.size
    of_runs = sum((mean - grand) ** 2 for mean in means) / (seeds - 1) / seeds
    rest = sum((gains[s, q] - means[s] - each[q] + grand) ** 2 for s in range(seeds) for q in range(questions))
    variance = of_questions + max(0, of_runs - rest / ((seeds - 1) * (questions - 1)) / (seeds * questions))
    return sum(each) / questions, variance, variance**2 / (of_questions**2 / clusters + of_runs**2 / (seeds - 1))


class Payload:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
