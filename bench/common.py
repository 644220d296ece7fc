"""What the measurements share: what they use of this repository, data, models, sides that take turns, results."""

import argparse
import contextlib
import importlib
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

PLACES = {
    "race": ["LETTERS", "RACE_QUESTIONS", "SPLITS", "RaceError"],
    "race.data": ["RaceDataModule", "collate"],
    "race.data.cache": ["build_cache", "write_manifest"],
    "race.data.module": ["RaceDataset"],
    "race.data.passages": ["read_source"],
    "race.demo.model": ["write_model"],
    "race.encoder": ["PACKED", "compile_layers", "takes_segments"],
    "race.files": ["file_hash", "read_archive"],
    "race.memory": ["fit_memory", "in_parts"],
    "race.score.predictions": ["accuracy_table", "predict"],
    "race.train.stages": ["Stage"],
    "race.train.training": ["start_stage", "train_stage"],
    "race_module": ["RaceModule"],
}
ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("RACE_TEST_DATA", ROOT.parent / "shared" / "data"))
WORK = ROOT / "cache" / "bench"
RACE, ALBERT = "race.tar.xz", "albert-base-v2"  # of the test data
RESULTS = Path(os.environ.get("RACE_BENCH_RESULTS", ROOT / "bench" / "results"))
PACKAGES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "pyarrow", "numpy")
ON_GPU = "cuda.json"  # all that was measured on a GPU: one file comes back from its machine
OURS, OURS_FP32 = "ours", "ours in fp32"
SIDES = (OURS, "padded to 512", "padded to the longest of a group")
PRECISION = {"cpu": "32-true", "cuda": "bf16-mixed"}  # what is measured where nothing is asked for
HALF = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # of a CPU, as /proc/cpuinfo names them
SHAPES = {  # hidden, heads, intermediate, layers; tiny is for the tests
    "tiny": (32, 4, 64, 2),
    "base": (768, 12, 3072, 12),
    "large": (1024, 16, 4096, 24),
    "xlarge": (2048, 16, 8192, 24),
}
OWN = {  # settings of a family that its shape does not say
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 2},  # places count from the padding id
    "mpnet": {"max_position_embeddings": 514},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "deberta-v2": {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
    | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False},
}


def used(name: str):
    """What the measurements use of this repository, imported at first use: some run where packages are missing."""
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(name)


__getattr__ = used  # of this module: common.RaceModule


# -------------------------------------------------------------------------------------------------- data


def at_hand(name: str) -> str:
    """A part of the test data ("race.tar.xz": real RACE text; "albert-base-v2": its vocabulary), else "demo"."""
    return str(TEST_DATA / name) if (TEST_DATA / name).exists() else "demo"


def real_cache() -> str:
    """The token cache that RACE_BENCH_CACHE names, else one of the text at hand, made on first use."""
    if given := os.environ.get("RACE_BENCH_CACHE"):
        return given
    folder = WORK / Path(at_hand(RACE)).name.split(".")[0]
    if not (folder / "manifest.json").exists():
        used("build_cache")(at_hand(RACE), at_hand(ALBERT), folder)
    return str(folder)


def record(passage) -> dict:
    """A passage in RACE's own layout."""
    answers = [used("LETTERS")[label] for label in passage.labels]
    parts = {"article": passage.article, "questions": passage.questions, "options": passage.options}
    return {"id": passage.example_id} | parts | {"answers": answers}


def write_records(passages: list, folder: Path) -> int:
    """Write passages as files of one record each; returns the number of questions."""
    folder.mkdir(parents=True)
    for i, passage in enumerate(passages):
        (folder / f"{i}.json").write_text(json.dumps(record(passage)), encoding="utf-8")
    return sum(len(passage.questions) for passage in passages)


def draw(cache: str, split: str, questions: int) -> list[dict]:
    """Questions of a split as `drawn` draws them, in random order."""
    dataset = used("RaceDataset")(cache, split)
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


def random_items(lengths: np.ndarray, rng: np.random.Generator, vocabulary: int, second: int = 12) -> list[dict]:
    """Questions of random tokens, as RaceDataset gives them; lengths: [n, 4] tokens, the last `second` a segment."""
    return [
        {
            "input_ids": [rng.integers(5, vocabulary, length) for length in question],
            "token_type_ids": [np.repeat([0, 1], [length - second, second]) for length in question],
            "label": int(rng.integers(4)),
        }
        for question in lengths
    ]


def pad(items: list[dict], longest: int | None, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Questions as padded [n, 4, L] tensors, L = `longest` or the longest sequence among them."""
    sequences = [ids for item in items for ids in item["input_ids"]]
    kinds = [segments for item in items for segments in item["token_type_ids"]]
    longest = longest or max(map(len, sequences))
    ids, segments, mask = (np.zeros((len(sequences), longest), np.int64) for _ in range(3))
    for i, (sequence, kind) in enumerate(zip(sequences, kinds, strict=True)):
        ids[i, : len(sequence)], segments[i, : len(sequence)], mask[i, : len(sequence)] = sequence, kind, 1
    arrays = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
    tensors = {name: torch.from_numpy(array).view(-1, 4, longest) for name, array in arrays.items()}
    tensors["labels"] = torch.tensor([item["label"] for item in items])
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------------------- models


def config(family: str, vocabulary: int, hidden: int, heads: int, intermediate: int, layers: int, **more):
    """A family's configuration of this shape, without dropout, so that sides agree."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers}
    sizes |= dict.fromkeys(("intermediate_size", "hidden_dim"), intermediate) | {"pooler_hidden_size": hidden}
    named = {kind.attribute_map.get(name, name): value for name, value in sizes.items()}
    known = {name: value for name, value in named.items() if name in default}
    none = {name: 0.0 for name, value in default.items() if "dropout" in name and isinstance(value, float)}
    return kind(**known | none | OWN.get(family, {}) | more)


def albert_config(shape: str, cache: str | Path):
    """An ALBERT of this shape for the vocabulary of this cache."""
    manifest = json.loads((Path(cache) / "manifest.json").read_text(encoding="utf-8"))
    return config("albert", manifest["tokenizer"]["vocabulary"], *SHAPES[shape])


def our_module(config, device: str, half: bool = False):
    """RaceModule for steps without a trainer, on the device, its micro-batches fitted to the memory there."""
    module = used("RaceModule")(config=config)
    module.manual_backward, module.log = torch.Tensor.backward, lambda *_, **__: None
    used("fit_memory")(module.to(device), torch.device(device), half)
    return module


def side_model(side: str, options: argparse.Namespace, cache: str):
    """Hugging Face's model as it comes, or ours with the same random weights, on the device."""
    from transformers import AlbertForMultipleChoice

    settings = albert_config(options.shape, cache)
    torch.manual_seed(0)
    model = AlbertForMultipleChoice(settings)
    if not is_ours(side):
        return model.to(options.device)
    module = our_module(settings, options.device, half=side == OURS and HALF[options.precision] is not None)
    module.model.load_state_dict(model.state_dict())
    return module


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager:
    """torch's autocast as training steps run under it, or nothing in float32."""
    return torch.autocast(device, HALF[precision]) if HALF[precision] else contextlib.nullcontext()


def trainer(precision: str, device: str, steps: int, callbacks: list):
    """A trainer as race.train.training makes it as far as a step's time and memory go: no files, no progress bar."""
    import pytorch_lightning as pl

    class MixedPrecision(pl.plugins.MixedPrecision):
        def autocast_context_manager(self) -> contextlib.AbstractContextManager:
            return autocast(device, precision)  # Lightning's own forgets the casts of weights at once

    half = HALF[precision] is not None
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    return pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=None if half else precision,
        plugins=[MixedPrecision(precision, device)] if half else None,
        callbacks=callbacks,
        limit_val_batches=0,
        **dict.fromkeys(off, False),
    )


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


# -------------------------------------------------------------------------------------------------- sides


def parser(doc: str, **numbers: int | None) -> argparse.ArgumentParser:
    """A parser with an option of whole numbers for each default."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        made.add_argument(f"--{name}", type=int, default=default)
    return made


def sides_parser(doc: str) -> argparse.ArgumentParser:
    """A parser for sides that take turns. questions: of a step or in all; group: at once, for Hugging Face."""
    made = parser(doc, questions=None, rounds=None, group=None)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--shape", choices=SHAPES, default="base")
    made.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="fp32; on a GPU bf16")
    return made


def with_defaults(options: argparse.Namespace, cpu: dict, gpu: dict) -> argparse.Namespace:
    """The options given; the others are those for the device."""
    usual = {"precision": PRECISION[options.device]} | (gpu if options.device == "cuda" else cpu)
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**vars(options) | usual | given)


def is_ours(side: str) -> bool:
    """Whether a side runs this repository's code."""
    return side in (OURS, OURS_FP32)


def sides_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The sides of a run: in bf16 on CPU, also ours in fp32."""
    return (*SIDES, OURS_FP32) if options.device == "cpu" and options.precision != "32-true" else SIDES


def side_autocast(side: str, options: argparse.Namespace) -> contextlib.AbstractContextManager:
    """What a side computes under."""
    return autocast(options.device, "32-true" if side == OURS_FP32 else options.precision)


@contextlib.contextmanager
def processes(options: argparse.Namespace, setup: Callable, cache: str) -> Iterator[dict[str, Callable]]:
    """A process for each side, set up by `setup(side, cache, options)`; gives call(function, *arguments) for each.

    Processes of their own keep the sides' memory and allocators apart; only one computes at a time. Both paddings share
    one: Hugging Face's model takes 10 GB for a step, which glibc then keeps.
    """
    context, pools = multiprocessing.get_context("spawn"), {}
    with contextlib.ExitStack() as stack:
        for side in sides_of(options):
            pool = pools.get(SIDES[1]) if side == SIDES[2] else None
            pools[side] = pool or stack.enter_context(ProcessPoolExecutor(1, context, setup, (side, cache, options)))
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
    """Seconds that a call takes on the device: what was started before has ended, and what it started has."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else bool
    wait()
    start = time.perf_counter()
    run()
    wait()
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


def comparison(
    options: argparse.Namespace, lengths: np.ndarray, seconds: dict, products: list[float], passes: int
) -> dict:
    """Questions a second and share of the matrix-product rate of each side, and how many times as fast ours is.

    seconds: of each step, by side; a side without any ran out of memory. passes: forward passes that a step's FLOPs
    are worth.
    """
    median = {side: statistics.median(values) for side, values in seconds.items()}
    sides = {side: {"out_of_memory": True} for side in sides_of(options)}
    for side in seconds:
        rates = [options.questions / value for value in seconds[side]]
        sides[side] = {"questions_per_second": spread(rates)}
        if side != OURS_FP32:  # the matrix products are those of the other precision
            flops = passes * forward_flops(options.shape, lengths, last_layer_at_cls=side == OURS)
            sides[side]["share_of_matrix_product"] = flops / median[side] / statistics.median(products)
    return {name: getattr(options, name) for name in ("shape", "precision", "questions", "group", "rounds")} | {
        "tokens_per_sequence": float(np.mean(lengths)),
        "matrix_product_gflops": {name: value / 1e9 for name, value in spread(products).items()},
        "sides": sides,
        "ratios": {side: median[side] / median[OURS] for side in median if side != OURS and OURS in median},
    }


def result_name(name: str, options: argparse.Namespace) -> str:
    """The name of a result, with what differs from the usual: shape, precision, compiled layers."""
    shape = [] if options.shape == "base" else [options.shape]
    precision = [] if options.precision == PRECISION[options.device] else [options.precision.partition("-")[0]]
    return "-".join([name, *shape, *precision, *(["compile"] if getattr(options, "compile", False) else [])])


def report(name: str, result: dict, device: str = "cpu") -> dict:
    """Print a result and keep it, with the machine and the versions, at once and whole; returns it.

    In bench/results/NAME.json; what was measured on a GPU, by name in cuda.json.
    """
    on = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": on, "cores": os.cpu_count(), "processor": _cpuinfo("model name") or platform.machine()}
    machine |= {name: name in _cpuinfo("flags").split() for name in BF16_INSTRUCTIONS}
    machine["python"] = platform.python_version()
    machine["load"] = round(os.getloadavg()[2], 1)  # processes at work in the last 15 minutes: more than ours is noise
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    versions = {"this repository": project} | {package: _version(package) for package in PACKAGES}
    text = Path(os.environ.get("RACE_BENCH_CACHE", at_hand(RACE))).name
    content = {"machine": machine, "versions": versions, "source": text} | result
    path = RESULTS / f"{name}.json"
    if device == "cuda":
        path, content = RESULTS / ON_GPU, gpu_results() | {name: content}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
    print(json.dumps(result, indent=1))
    return result


def gpu_results() -> dict[str, dict]:
    """All that was measured on a GPU, by name."""
    path = RESULTS / ON_GPU
    return json.loads(path.read_text()) if path.exists() else {}


def kept_result(name: str, device: str = "cpu") -> dict | None:
    """A kept result, or None."""
    if device == "cuda":
        return gpu_results().get(name)
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo(field: str) -> str:
    """A field of /proc/cpuinfo, "" where it has none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")
