"""One training step: ours against Hugging Face's AlbertForMultipleChoice, padded to 512 or to the longest of four.

The same questions, drawn at random; the same random weights; albert-base's shape; forward, loss, backward and AdamW.
Model FLOPs are counted for the tokens that each question really has: per token and layer 2·(4·h² + 2·h·i) for the
matrix products and 4·h·L for attention in a sequence of L tokens, three times that for forward and backward. Ours
leaves out what is never read: in the last layer everything but keys and values is computed for [CLS] only.
"""

import argparse
import time

import numpy as np
import torch

from bench.common import in_turn, real_cache, report, spread, timed, tokenizer_folder

SHAPES = {"base": (768, 12, 3072), "large": (1024, 16, 4096), "xlarge": (2048, 16, 8192)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16, help="questions in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    options = parser.parse_args()
    from transformers import AlbertConfig, AlbertForMultipleChoice, AutoTokenizer

    from race_data import RaceDataset, collate
    from race_module import RaceModule

    hidden, heads, intermediate = SHAPES[options.shape]
    dataset = RaceDataset(real_cache(), "train")
    vocabulary = len(AutoTokenizer.from_pretrained(real_cache() / "model"))
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate}
    layers = 24 if options.shape != "base" else 12
    config = AlbertConfig(vocab_size=vocabulary, num_hidden_layers=layers, **shape)
    torch.manual_seed(0)
    reference = AlbertForMultipleChoice(config)
    module = RaceModule(config=config)
    module.model.load_state_dict(reference.state_dict())
    module.manual_backward, module.log, module.token_budget = torch.Tensor.backward, lambda *_, **__: None, 4096
    items = [dataset[i] for i in np.random.default_rng(0).choice(len(dataset), options.questions, replace=False)]
    optimizers = {id(model): torch.optim.AdamW(model.parameters(), lr=0.0) for model in (reference, module)}

    def ours() -> None:
        optimizers[id(module)].zero_grad()
        module._step(collate(items), "train")
        optimizers[id(module)].step()

    def padded(longest: int | None) -> None:
        optimizers[id(reference)].zero_grad()
        for i in range(0, len(items), 4):
            batch = pad(items[i : i + 4], longest)
            (reference(**batch).loss * len(batch["labels"]) / len(items)).backward()
        optimizers[id(reference)].step()

    sides = {"ours": ours, "padded to 512": lambda: padded(512), "padded to the longest of 4": lambda: padded(None)}
    seconds = in_turn({name: (lambda run=run: timed(run)) for name, run in sides.items()}, options.rounds)
    lengths = np.array(collate(items).lengths)
    per_token = layers * 2 * (4 * hidden**2 + 2 * hidden * intermediate)
    flops = 3 * float((lengths * per_token + layers * 4 * hidden * lengths**2).sum())
    last = 3 * 2 * float((lengths - 1).sum()) * (2 * hidden**2 + 2 * hidden * intermediate)
    last += 3 * 4 * hidden * float((lengths**2 - lengths).sum())
    peak = matrix_rate()
    result = {"shape": options.shape, "questions": options.questions, "tokens_per_sequence": float(lengths.mean())}
    result["matrix_product_gflops"] = peak / 1e9
    result["sides"] = {}
    for name, values in seconds.items():
        counted = flops - last if name == "ours" else flops
        rate = counted / spread(values)["median"]
        result["sides"][name] = {
            "questions_per_second": spread([options.questions / value for value in values]),
            "model_gflops": rate / 1e9,
            "share_of_matrix_product": rate / peak,
        }
    median = {name: spread(values)["median"] for name, values in seconds.items()}
    result["ratios"] = {name: median[name] / median["ours"] for name in list(sides)[1:]}
    report("train_step", result | {"vocabulary": tokenizer_folder().rpartition("/")[2]})


def pad(items: list[dict], longest: int | None) -> dict[str, torch.Tensor]:
    """Questions as padded [n, 4, L] tensors, L = `longest` or the longest sequence among them."""
    sequences = [ids for item in items for ids in item["input_ids"]]
    longest = longest or max(map(len, sequences))
    ids, segments, mask = (np.zeros((len(sequences), longest), np.int64) for _ in range(3))
    for i, (sequence, kinds) in enumerate(
        zip(sequences, (kinds for item in items for kinds in item["token_type_ids"]), strict=True)
    ):
        ids[i, : len(sequence)], segments[i, : len(sequence)], mask[i, : len(sequence)] = sequence, kinds, 1
    arrays = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
    tensors = {name: torch.from_numpy(array).view(-1, 4, longest) for name, array in arrays.items()}
    return tensors | {"labels": torch.tensor([item["label"] for item in items])}


def matrix_rate(size: int = 3072, rounds: int = 5) -> float:
    """FLOP/s of a plain matrix product, the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
