"""What to run on a machine with a CUDA GPU that is lent for minutes, and has no network, in two calls of five minutes.

prepare  beforehand, on a machine with everything: the folder to take along, of 60 MiB at most
measure  the packed path against Hugging Face in float64 on the CPU, a stage that is killed and resumed against a whole
         one, a training step, an epoch of RACE from 200 steps, scoring
train    three stages with real pretrained weights on real text, a linear schedule with the same epochs, both scored on
         RACE/dev; a training step with compiled layers; then both recipes with a second seed

Every result is kept as soon as it exists, on a GPU in one file, bench/results/cuda.json (RACE_BENCH_RESULTS changes the
folder). What has its result is not run again. A call ends when its time is up, a stage with its state saved: call it
again to go on. `--small` is the form for a rehearsal: its results lie in a folder small, so that none is taken for a
real one.
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

from bench import common, evaluate, train_step
from bench.carried import CARRIED, prepare

PACKAGES = ("pyarrow", "pandas", "psutil", "scipy", "statsmodels", "tensorboard")  # beside torch and Lightning
RECIPES = {  # stages: (rate, epochs, schedule); five times the recipe's rates, for so small a model; not tuned
    "chain": {"e1": (1e-4, 2, "constant"), "e2": (1e-4, 1, "constant"), "e3": (1e-5, 1, "constant")},
    "linear": {"e1": (1e-4, 4, "linear")},
}
SEEDS = (1, 2)
FLOAT32_ERROR = 1e-3  # relative, for logits and for gradients
TIMES_THEIRS = 2.0  # how much more than Hugging Face's own bf16 ours may be off
FAMILIES = ("albert", "bert", "roberta", "electra", "modernbert", "deberta-v2")
SMALL = (1000, 128, 2, 256, 3)  # vocabulary, hidden, heads (of 64 places, as in the real ones), intermediate, layers
WINDOW = {"modernbert": {"local_attention": 64, "global_attn_every_n_layers": 2}}
PRECISION = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed"}


def main(arguments: list[str] | None = None) -> int:
    """Run one part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", *PARTS))
    parser.add_argument("--carried", type=Path, default=CARRIED, help="the folder that prepare makes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="little of everything")
    parser.add_argument("--minutes", type=float, default=5.0, help="time limit of a call")
    options = parser.parse_args(arguments)
    if options.part == "prepare":
        print(prepare(options.carried, small=options.small))
        return 0
    if problems := missing(options):
        print("error: " + "; ".join(problems), file=sys.stderr)
        return 1
    if options.small and common.RESULTS.name != "small":
        common.RESULTS /= "small"
    os.environ["RACE_BENCH_CACHE"] = str(options.carried)
    failed = 0
    with time_limit(60 * options.minutes):
        for name, run in PARTS[options.part](options).items():
            if common.kept_result(name, options.device):
                print(f"── {name}: done before")
                continue
            started = time.monotonic()
            print(f"── {name}", flush=True)
            try:
                run()
            except Exception:  # whatever it is: the others are measured all the same
                traceback.print_exc()
                failed += 1
            print(f"── {name}: {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process and those that it has started by SIGTERM when the time is up: a stage saves its state first."""

    def end(*_) -> None:
        print("── the time of this call is up: call again to go on", flush=True)
        for process in multiprocessing.active_children():
            process.kill()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def missing(options: argparse.Namespace) -> list[str]:
    """What this machine lacks for the part."""
    packages = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    problems = [f"{', '.join(packages)}: not installed"] if packages else []
    if options.device == "cuda" and not torch.cuda.is_available():
        problems.append("torch sees no CUDA GPU (--device cpu --small runs a small form)")
    if not (options.carried / "manifest.json").exists():
        problems.append(f"{options.carried} is missing: run `bench/gpu_day.sh prepare` beforehand and take it along")
    return problems


# -------------------------------------------------------------------------------------------------- parity


def small_config(family: str):
    """A small model of a family without dropout."""
    return common.config(family, *SMALL, initializer_range=0.05, **WINDOW.get(family, {}))


def random_items(questions: int, longest: int = 512, seed: int = 0) -> list[dict]:
    """Questions of random tokens and unequal lengths, as RaceDataset gives them."""
    rng = np.random.default_rng(seed)
    return common.random_items(rng.integers(10, longest + 1, (questions, 4)), rng, SMALL[0], second=5)


def gradients(options: argparse.Namespace) -> dict:
    """Relative errors of logits and gradients on the device, float32 and bf16, from Hugging Face's in float64 on CPU.

    Raises RuntimeError where float32 is off by more than 0.1 %, or bf16 by twice what Hugging Face's own bf16 is.
    """
    items, errors, problems = random_items(*((3, 160) if options.small else (8, 512))), {}, []
    for family in FAMILIES:
        exact = _padded(family, items, "cpu", torch.float64)
        for dtype in PRECISION:
            name = f"{family} {str(dtype).removeprefix('torch.')}"
            ours = relative_errors(_packed(family, items, options.device, dtype), exact)
            theirs = relative_errors(_padded(family, items, options.device, dtype), exact)
            errors[name] = {"ours": ours, "hugging_face": theirs}
            for kind in ours:
                allowed = FLOAT32_ERROR if dtype == torch.float32 else TIMES_THEIRS * theirs[kind]
                if not ours[kind] <= allowed:
                    problems.append(f"{name}, {kind}: off by {ours[kind]:.2g}, allowed {allowed:.2g}")
    result = common.report("gpu_parity", {"relative_errors": errors, "problems": problems}, options.device)
    if problems:
        raise RuntimeError("this repository differs from Hugging Face: " + "; ".join(problems))
    return result


def _theirs(family: str):
    from transformers import AutoModelForMultipleChoice

    torch.manual_seed(0)
    return AutoModelForMultipleChoice.from_config(small_config(family))


def _padded(family: str, items: list[dict], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits and gradients of Hugging Face's model, padded."""
    model = _theirs(family).to(device).train()
    if dtype == torch.float64:
        model.double()
    batch = common.pad(items, None, device)
    if not common.takes_segments(model):
        batch.pop("token_type_ids")
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(**batch).logits
    return _backward(model, logits, batch["labels"])


def _packed(family: str, items: list[dict], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits and gradients of RaceModule with the same weights, packed."""
    module = common.RaceModule(config=small_config(family))
    module.model.load_state_dict(_theirs(family).state_dict())
    batch = common.collate(items).to(device)
    module.to(device)
    with common.autocast(device, PRECISION[dtype]):
        logits = module(batch)
    return _backward(module.model, logits, batch.labels)


def _backward(model, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    gradients = torch.cat([it.grad.flatten() for it in model.parameters() if it.grad is not None])
    return {"logits": logits.detach().double().cpu(), "gradients": gradients.double().cpu()}


def relative_errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """For each kind, the norm of the difference over the norm of the exact values."""
    return {kind: ((found[kind] - exact[kind]).norm() / exact[kind].norm()).item() for kind in exact}


# -------------------------------------------------------------------------------------------------- exactness


def exact_stage(folder: Path, options: argparse.Namespace, killed: bool) -> None:
    """A stage of one epoch with DETERMINISTIC, or what is left of it; killed: by SIGKILL at the start of a step."""
    questions, size, step = (48, 8, 2) if options.small else (1024, 32, 11)

    class Kill(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_) -> None:
            if killed and trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    pl.seed_everything(0, verbose=False)
    stage = common.Stage("e1", folder / "checkpoints", folder / "run")
    module = common.start_stage(stage, options.carried, learning_rate=1e-4, max_grad_norm=1.0)
    data = common.RaceDataModule(options.carried, batch_size=size, limit_questions=questions)
    common.train_stage(stage, module, data, 1, deterministic=True, save_minutes=0, callbacks=[Kill()], **_on(options))


def exactness(options: argparse.Namespace) -> dict:
    """Whether a stage that was killed by SIGKILL in the middle of an epoch and resumed ends in the same bits."""
    folder, spawn = _folder(options) / "exact", multiprocessing.get_context("spawn")
    shutil.rmtree(folder, ignore_errors=True)
    for name, killed in (("whole", False), ("cut", True), ("cut", False)):
        process = spawn.Process(target=exact_stage, args=(folder / name, options, killed))
        process.start()
        process.join()
        if process.exitcode != (-signal.SIGKILL if killed else 0):
            raise RuntimeError(f"a stage ended with {process.exitcode}")
    names = ("whole", "cut")
    whole, cut = (common.read_archive(folder / name / "checkpoints" / "resume" / "e1.ckpt") for name in names)
    found = {part: identical(whole[part], cut[part]) for part in ("state_dict", "optimizer_states")}
    found["random_states"] = identical(whole["resume"]["random"], cut["resume"]["random"])
    kept = [[it.read_bytes() for it in sorted((folder / name / "checkpoints").glob("*.ckpt"))] for name in names]
    found["checkpoint_bytes"] = kept[0] == kept[1] != []
    common.report("gpu_exact", found, options.device)
    if not all(found.values()):
        raise RuntimeError(f"a resumed stage differs from a whole one: {found}")
    return found


def identical(one: object, other: object) -> bool:
    """Whether two nested values are equal, tensors in every bit."""
    (ours, form), (theirs, same_form) = tree_flatten(one), tree_flatten(other)
    equal = (
        torch.equal(a.cpu(), b.cpu()) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs, strict=False)
    )
    return form == same_form and all(equal)


# -------------------------------------------------------------------------------------------------- speed


def epoch(options: argparse.Namespace) -> dict:
    """Seconds a step of the trainer as a stage uses it, over 200 steps after 20, and what a RACE epoch would take."""
    warm_up, steps = (1, 3) if options.small else (20, 200)
    marks: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.global_step in (warm_up, warm_up + steps):
                if options.device == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

    data = common.RaceDataModule(options.carried, batch_size=2 if options.small else 32)
    module = common.RaceModule(config=common.albert_config("tiny" if options.small else "base", options.carried))
    precision = common.PRECISION[options.device]
    common.trainer(precision, options.device, warm_up + steps, [Clock()]).fit(module, data)
    seconds, of_race = (marks[1] - marks[0]) / steps, -(-common.RACE_QUESTIONS["train"] // data.batch_size)
    result = {"steps": steps, "questions_a_step": data.batch_size, "seconds_a_step": seconds, "precision": precision}
    result |= {"token_budget": module.token_budget, "race_epoch_seconds": seconds * of_race}
    return common.report("gpu_epoch", result | {"peak_mb": common.peak_mb()}, options.device)


# -------------------------------------------------------------------------------------------------- training


def run_stage(name: str, recipe: str, seed: int, options: argparse.Namespace) -> dict:
    """Train a stage as its notebook does, choose its best checkpoint on validation, score it on the test split.

    The carried cache's test split is RACE/dev; its validation split is held out of RACE/train.
    """
    rate, epochs, schedule = RECIPES[recipe][name]
    folder, limit = _folder(options) / f"{recipe}-seed{seed}", 64 if options.small else None
    pl.seed_everything(seed, verbose=False)
    data = common.RaceDataModule(options.carried, batch_size=32, limit_questions=limit)
    stage = common.Stage(name, folder / "checkpoints", folder / "run")
    module = common.start_stage(stage, options.carried, learning_rate=rate, schedule=schedule)
    started = time.perf_counter()
    trainer = common.train_stage(stage, module, data, 1 if options.small else epochs, save_minutes=1, **_on(options))
    seconds, best = time.perf_counter() - started, stage.best()
    predictions = common.predict(best, data, "test", **_on(options))
    scores = common.accuracy_table(predictions, name, best.name, "RACE/dev").query("level == 'all'").iloc[0]
    result = {"recipe": recipe, "seed": seed, "stage": name, "learning_rate": rate, "schedule": schedule}
    result |= {"epochs": trainer.current_epoch, "seconds_of_this_call": seconds, "checkpoint": best.name}
    result["train_questions"] = len(data.dataset("train"))
    result |= {it: float(scores[it]) for it in ("questions", "correct", "accuracy", "ci_low", "ci_high")}
    return common.report(stage_result(recipe, seed, name), result, options.device)


def stage_result(recipe: str, seed: int, stage: str) -> str:
    """The name of its result."""
    return f"gpu_{recipe}-seed{seed}-{stage}"


def _folder(options: argparse.Namespace) -> Path:
    return common.WORK / "gpu_day" / ("small" if options.small else "runs")


def _on(options: argparse.Namespace) -> dict[str, str]:
    return {"accelerator": "gpu" if options.device == "cuda" else "cpu"}


# -------------------------------------------------------------------------------------------------- calls


def measure(options: argparse.Namespace) -> dict[str, Callable]:
    """What a call runs: a result's name, and how it is made."""
    device, few = ["--device", options.device], ["--shape", "tiny", "--questions", "4"] if options.small else []
    tiny, rounds = "-tiny" if few else "", ["--rounds", "1" if few else "8"]
    return {
        "gpu_parity": lambda: gradients(options),
        "gpu_exact": lambda: exactness(options),
        f"train_step{tiny}": lambda: train_step.main([*device, *few, *rounds]),
        "gpu_epoch": lambda: epoch(options),
        f"evaluate{tiny}": lambda: evaluate.main([*device, *few]),
    }


def train(options: argparse.Namespace) -> dict[str, Callable]:
    """The same of the other call; the second seed comes last, if there is time."""
    device, few = ["--device", options.device], ["--shape", "tiny", "--questions", "4"] if options.small else []
    stages = [(recipe, name) for recipe, stages in RECIPES.items() for name in stages]
    runs = {
        stage_result(recipe, seed, name): partial(run_stage, name, recipe, seed, options)
        for seed in SEEDS
        for recipe, name in stages
    }
    first = dict(list(runs.items())[: len(stages)])
    step = f"train_step{'-tiny' if few else ''}-compile"
    return first | {step: lambda: train_step.main([*device, *few, "--rounds", "4", "--compile"])} | runs


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Callable]]] = {"measure": measure, "train": train}

if __name__ == "__main__":
    sys.exit(main())
