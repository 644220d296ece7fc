"""What to run on a machine with a CUDA GPU that has torch, transformers and pytorch-lightning, but no network.

prepare  beforehand, on a machine with everything: the folder to take along, of 60 MiB at most
parity   the packed path on the device against Hugging Face in float64 on the CPU, and a loss curve against the CPU's
speed    the benchmarks, and an epoch of RACE extrapolated from 200 steps of the trainer
chain    three stages with real pretrained weights on real text, scored on RACE/dev

Every result is a file in bench/results (RACE_BENCH_RESULTS changes the folder). What has its file is not run again, and
nothing is begun that the last eight minutes of a call's nine would not hold: call it again to go on. `--small` is the
form for a test on CPU; its results lie in a folder small, so that none is taken for a real one.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench import common, evaluate, loader, train_step
from bench.carried import CARRIED, prepare

NEEDED = {"prepare": (), "parity": (), "speed": ("pyarrow",)}
NEEDED["chain"] = ("pyarrow", "pandas", "psutil", "scipy", "statsmodels", "tensorboard")
RATES = {"e1": 1e-4, "e2": 1e-4, "e3": 1e-5}  # five times the recipe's, for so small a model; not tuned
EPOCHS = {"e1": 4, "e2": 2, "e3": 2}
FLOAT32_ERROR = 1e-3  # relative, for logits and for gradients
TIMES_THEIRS = 2.0  # how much more than Hugging Face's own bf16 ours may be off
FAMILIES = ("albert", "bert", "roberta", "electra", "modernbert", "deberta-v2")
SMALL = (1000, 128, 2, 256, 3)  # vocabulary, hidden, heads (of 64 places, as in the real ones), intermediate, layers
WINDOW = {"modernbert": {"local_attention": 64, "global_attn_every_n_layers": 2}}
PRECISION = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed"}


def main(arguments: list[str] | None = None) -> int:
    """Run one part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "parity", "speed", "chain"))
    parser.add_argument("--carried", type=Path, default=CARRIED, help="the folder that prepare makes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="little of everything")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of a call")
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
    deadline = time.monotonic() + 60 * (options.minutes - 1)
    for name, run in PARTS[options.part](options).items():
        if common.kept_result(name, options.device):
            print(f"── {name}: done before")
            continue
        if time.monotonic() > deadline:
            print(f"── {name}: no time left in this call; call again to resume")
            return 2
        started = time.monotonic()
        print(f"── {name}", flush=True)
        run()
        print(f"── {name}: {time.monotonic() - started:.0f} s", flush=True)
    return 0


def missing(options: argparse.Namespace) -> list[str]:
    """What this machine lacks for the part."""
    packages = [name for name in NEEDED[options.part] if not importlib.util.find_spec(name)]
    problems = [f"{', '.join(packages)}: not installed"] if packages else []
    if options.device == "cuda" and not torch.cuda.is_available():
        problems.append("torch sees no CUDA GPU (--device cpu --small runs a small form)")
    if options.part != "parity" and not (options.carried / "manifest.json").exists():
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


def curve(options: argparse.Namespace) -> dict:
    """The losses of a small ALBERT over 50 steps: bf16 on the device against float32 on the CPU, same batches."""
    steps = 5 if options.small else 50
    there, here = losses(steps, options.device, "bf16-mixed"), losses(steps, "cpu", "32-true")
    difference = max(abs(a - b) for a, b in zip(there, here, strict=True))
    result = {"steps": steps, "largest_difference": difference, "device": there, "cpu": here}
    common.report("gpu_curve", result, options.device)
    if not difference <= 0.05:
        raise RuntimeError(f"the loss curves part: by {difference:.3f} within {steps} steps")
    return result


def losses(steps: int, device: str, precision: str) -> list[float]:
    """The training losses of so many AdamW steps from the same weights on the same batches."""
    torch.manual_seed(0)
    module = common.RaceModule(config=small_config("albert"), learning_rate=1e-4).to(device).train()
    optimizer, values = module.configure_optimizers(), []
    for step in range(steps):
        batch = common.collate(random_items(8, longest=128, seed=step)).to(device)
        with common.autocast(device, precision):
            loss = F.cross_entropy(module(batch).float(), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values).tolist()


# -------------------------------------------------------------------------------------------------- speed


def speed(options: argparse.Namespace) -> dict[str, Callable]:
    """The benchmarks of this folder on the device, and an epoch of the trainer."""
    device, shape = ["--device", options.device], "tiny" if options.small else "base"
    few = ["--shape", shape, *(["--questions", "4", "--rounds", "1"] if options.small else [])]
    suffix, batches = ("-tiny", "5") if options.small else ("", "300")
    parts = {
        f"train_step{suffix}": lambda: train_step.main([*device, *few]),
        "gpu_epoch": lambda: epoch(options),
        f"evaluate{suffix}": lambda: evaluate.main([*device, *few]),
        "loader": lambda: loader.main([*device, "--batches", batches, "--rounds", "1"]),
    }
    if not options.small:
        for name in ("large", "xlarge"):
            parts[f"train_step-{name}"] = lambda name=name: train_step.main([*device, "--shape", name, "--rounds", "5"])
    return parts


def epoch(options: argparse.Namespace) -> dict:
    """Seconds a step of the trainer as a stage uses it, over 200 steps after 20, and what a RACE epoch would take."""
    import pytorch_lightning as pl

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


# -------------------------------------------------------------------------------------------------- chain


def run_stage(name: str, options: argparse.Namespace) -> dict:
    """Train a stage as its notebook does, choose its best checkpoint on validation, score it on the test split.

    The carried cache's test split is RACE/dev; its validation split is held out of RACE/train.
    """
    folder, limit = common.WORK / "gpu_day", 64 if options.small else None
    data = common.RaceDataModule(options.carried, batch_size=32, limit_questions=limit)
    stage = common.Stage(name, folder / "checkpoints", folder / "run")
    module = common.start_stage(stage, options.carried, learning_rate=RATES[name])
    started = time.perf_counter()
    trainer = common.train_stage(stage, module, data, 1 if options.small else EPOCHS[name])
    seconds, best = time.perf_counter() - started, stage.best()
    predictions = common.predict(best, data, "test", accelerator="gpu" if options.device == "cuda" else "cpu")
    scores = common.accuracy_table(predictions, name, best.name, "RACE/dev").query("level == 'all'").iloc[0]
    result = {"stage": name, "learning_rate": RATES[name], "epochs": trainer.current_epoch, "seconds": seconds}
    result |= {"train_questions": len(data.dataset("train")), "checkpoint": best.name}
    result |= {it: float(scores[it]) for it in ("questions", "correct", "accuracy", "ci_low", "ci_high")}
    return common.report(f"gpu_chain-{name}", result, options.device)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Callable]]] = {  # of each part: {result: how it is made}
    "parity": lambda options: {"gpu_parity": lambda: gradients(options), "gpu_curve": lambda: curve(options)},
    "speed": speed,
    "chain": lambda options: {f"gpu_chain-{name}": (lambda name=name: run_stage(name, options)) for name in RATES},
}

if __name__ == "__main__":
    sys.exit(main())
