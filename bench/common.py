"""What the measurements share: data, shapes, sides in processes of their own that take turns, medians, JSON."""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("RACE_TEST_DATA", ROOT.parent / "shared" / "data"))
WORK = ROOT / "cache" / "bench"
RESULTS = Path(os.environ.get("RACE_BENCH_RESULTS", ROOT / "bench" / "results"))
PACKAGES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "pyarrow", "numpy")
OURS, OURS_FP32 = "ours", "ours in fp32"
SIDES = (OURS, "padded to 512", "padded to the longest of a group")
PROCESSES = SIDES[:2]  # both paddings share one: Hugging Face's model takes 10 GB for a step, which glibc then keeps
HALF = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # of a CPU, as /proc/cpuinfo names them
SHAPES = {  # hidden, heads, intermediate, layers; tiny is for the tests
    "tiny": (32, 4, 64, 2),
    "base": (768, 12, 3072, 12),
    "large": (1024, 16, 4096, 24),
    "xlarge": (2048, 16, 8192, 24),
}


# -------------------------------------------------------------------------------------------------- data and models


def source() -> str:
    """Real RACE text where it is at hand, else the demo corpus."""
    race = TEST_DATA / "race.tar.xz"
    return str(race) if race.exists() else "demo"


def tokenizer_folder() -> str:
    """ALBERT's own vocabulary where it is at hand, else the demo's."""
    albert = TEST_DATA / "albert-base-v2"
    return str(albert) if albert.exists() else "demo"


def real_cache() -> Path:
    """The token cache that RACE_BENCH_CACHE names, else that of `source()`, made on first use."""
    from race.data.cache import build_cache

    if given := os.environ.get("RACE_BENCH_CACHE"):
        return Path(given)
    folder = WORK / Path(source()).name.split(".")[0]
    if not (folder / "manifest.json").exists():
        build_cache(source(), tokenizer_folder(), folder)
    return folder


def side_model(side: str, shape: str, cache: str):
    """Hugging Face's model as it comes, or ours with the same random weights."""
    import torch
    from transformers import AlbertForMultipleChoice

    from race_module import RaceModule

    config = albert_config(shape, cache)
    torch.manual_seed(0)
    model = AlbertForMultipleChoice(config)
    if side not in (OURS, OURS_FP32):
        return model
    weights, model = model.state_dict(), RaceModule(config=config)
    model.model.load_state_dict(weights)
    return model


def albert_config(shape: str, cache: Path):
    """An ALBERT configuration of this shape, for the vocabulary of this cache; without dropout, so that sides agree."""
    from transformers import AlbertConfig

    from race.data.cache import read_manifest

    hidden, heads, intermediate, layers = SHAPES[shape]
    return AlbertConfig(
        vocab_size=read_manifest(cache)["tokenizer"]["vocabulary"],
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )


def draw(cache: Path, split: str, questions: int) -> list[dict]:
    """Questions of a split as `drawn` draws them, in random order."""
    from race.data.module import RaceDataset

    dataset = RaceDataset(cache, split)
    return [dataset[int(i)] for i in drawn(dataset, questions)]


def drawn(dataset, questions: int, neighbours: int = 1, seed: int = 0) -> np.ndarray:
    """[questions] indices drawn at random, so many neighbours at a time, one draw from every stratum by length.

    Strata are equally large: a few questions drawn without them are often a tenth longer or shorter than a split's,
    and padding to 512 costs that much less or more.
    """
    tokens, draws = dataset.lengths().sum(1), -(-questions // neighbours)
    runs = tokens[: len(tokens) // neighbours * neighbours].reshape(-1, neighbours).sum(1)
    if draws > len(runs):
        raise ValueError(f"{questions} questions wanted, {neighbours} neighbours at a time, of {len(tokens)}")
    chance, strata = np.random.default_rng(seed), np.array_split(np.argsort(runs, kind="stable"), draws)
    first = neighbours * chance.permutation([chance.choice(stratum) for stratum in strata])
    return (first[:, None] + np.arange(neighbours)).ravel()[:questions]


def pad(items: list[dict], longest: int | None) -> dict[str, torch.Tensor]:
    """Questions as padded [n, 4, L] tensors, L = `longest` or the longest sequence among them."""
    sequences = [ids for item in items for ids in item["input_ids"]]
    kinds = [segments for item in items for segments in item["token_type_ids"]]
    longest = longest or max(map(len, sequences))
    ids, segments, mask = (np.zeros((len(sequences), longest), np.int64) for _ in range(3))
    for i, (sequence, kind) in enumerate(zip(sequences, kinds, strict=True)):
        ids[i, : len(sequence)], segments[i, : len(sequence)], mask[i, : len(sequence)] = sequence, kind, 1
    arrays = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
    tensors = {name: torch.from_numpy(array).view(-1, 4, longest) for name, array in arrays.items()}
    return tensors | {"labels": torch.tensor([item["label"] for item in items])}


# -------------------------------------------------------------------------------------------------- FLOPs


def forward_flops(shape: str, lengths: np.ndarray, last_layer_at_cls: bool) -> float:
    """FLOPs that a forward pass over sequences of these lengths needs; a training step needs three times as many.

    A token and layer: 2·(4·h² + 2·h·i) for the matrix products with weights, and 4·h·L for attention in a sequence
    of L tokens. With last_layer_at_cls, what nothing reads is left out: the last layer computes keys and values of all
    tokens, and the rest at [CLS] only. Padding is never counted; embeddings, norms and GELU are not either.
    """
    hidden, _, intermediate, layers = SHAPES[shape]
    lengths = np.asarray(lengths, np.float64)
    per_token = 2 * (4 * hidden**2 + 2 * hidden * intermediate)
    full = lengths * per_token + 4 * hidden * lengths**2
    if not last_layer_at_cls:
        return float(layers * full.sum())
    last = lengths * 4 * hidden**2 + per_token - 4 * hidden**2 + 4 * hidden * lengths
    return float((layers - 1) * full.sum() + last.sum())


def matrix_rate(device: str = "cpu", precision: str = "32-true", products: int = 3) -> list[float]:
    """FLOP/s of plain matrix products into a buffer that is there already, each one timed, in this precision."""
    size, dtype = 8192 if device == "cuda" else 3072, HALF[precision] or torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    return [2 * size**3 / timed(lambda: torch.mm(a, b, out=out)) for _ in range(products)]


# -------------------------------------------------------------------------------------------------- precision


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option --precision; None: `default_precision`."""
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="fp32; on a GPU bf16")


def default_precision(device: str) -> str:
    """What is measured where nothing is asked for."""
    return "bf16-mixed" if device == "cuda" else "32-true"


def sides_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The sides of a run: in bf16 on CPU, also ours in fp32."""
    return (*SIDES, OURS_FP32) if options.device == "cpu" and options.precision != "32-true" else SIDES


def process_of(side: str) -> str:
    """The process in which a side computes."""
    return side if side in (OURS, OURS_FP32) else PROCESSES[1]


def autocast(side: str, options: argparse.Namespace) -> contextlib.AbstractContextManager:
    """What a side computes under: ours what training steps run under, Hugging Face's model torch's own autocast."""
    precision = "32-true" if side == OURS_FP32 else options.precision
    if side in (OURS, OURS_FP32):
        from race.train.precision import autocast

        return autocast(options.device, precision)
    return torch.autocast(options.device, HALF[precision]) if HALF[precision] else contextlib.nullcontext()


def trainer(precision: str, device: str, steps: int, callbacks: list):
    """A trainer as race.train.training makes it as far as a step's time and memory go: no files, no progress bar."""
    import pytorch_lightning as pl

    from race.train.precision import Autocast

    settings = {"precision": precision} if HALF[precision] is None else {"plugins": [Autocast(precision, device)]}
    return pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **settings,
    )


# -------------------------------------------------------------------------------------------------- taking turns


@contextlib.contextmanager
def processes(sides: list[str], setup: Callable, *arguments) -> Iterator[dict[str, Callable]]:
    """A process for each side, set up by `setup(side, *arguments)`; gives call(function, *arguments) for each.

    Processes of their own keep the sides' memory and allocators apart; only one computes at a time.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {
            side: stack.enter_context(ProcessPoolExecutor(1, context, setup, (side, *arguments))) for side in sides
        }
        yield {
            side: (lambda function, *args, pool=pool: pool.submit(function, *args).result())
            for side, pool in pools.items()
        }


def in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every side once a round, in turn, so that a slow minute of the machine hits all of them; returns seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            seconds[name].append(run())
            print(f"  round {number + 1}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes, to the end of what it started on the device."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mb() -> float:
    """Peak memory of this process in MB: of the GPU where it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had at the fork
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3


# -------------------------------------------------------------------------------------------------- results


def spread(values: list[float]) -> dict:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def result_name(name: str, options: argparse.Namespace) -> str:
    """The name of a result, with what differs from the usual: shape and precision."""
    shape = [] if options.shape == "base" else [options.shape]
    return "-".join([name, *shape, *([] if options.precision == default_precision(options.device) else ["bf16"])])


def report(name: str, result: dict, device: str = "cpu") -> Path:
    """Print a result and keep it in bench/results/NAME.json, with the machine and the versions."""
    on = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": on, "cores": os.cpu_count(), "processor": _cpuinfo("model name")}
    machine |= {name: name in _cpuinfo("flags").split() for name in BF16_INSTRUCTIONS}
    machine["python"] = platform.python_version()
    machine["load"] = round(os.getloadavg()[2], 1)  # processes at work in the last 15 minutes: more than ours is noise
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    versions = {"this repository": project} | {package: _version(package) for package in PACKAGES}
    text = Path(os.environ.get("RACE_BENCH_CACHE", source())).name
    record = {"machine": machine, "versions": versions, "source": text} | result
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}{'-cuda' if device == 'cuda' else ''}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
    print(json.dumps(result, indent=1))
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo(field: str) -> str:
    """A field of /proc/cpuinfo, "" where it has none; the processor's name from elsewhere if need be."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")
    return found or (platform.machine() if field == "model name" else "")
