"""What to run on a machine with a CUDA GPU that has torch, transformers and pytorch-lightning, but no network.

prepare  beforehand, on a machine with everything: the folder to take along, of 60 MiB at most
parity   the packed path on the device against Hugging Face in float64 on the CPU, and a loss curve against the CPU's
speed    the benchmarks, and an epoch of RACE extrapolated from 200 steps of the trainer
chain    three stages with real pretrained weights on real text, scored on RACE/dev

Every result is a file in bench/results (RACE_BENCH_RESULTS changes the folder). What has its file is not run again, and
nothing is begun that the last eight minutes of a call's nine would not hold: call it again to go on. `--small` is the
form for a test on CPU.
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

from bench import common, evaluate, loader, scaling, train_step
from bench.carried import CARRIED, prepare

NEEDED = {"prepare": (), "parity": (), "speed": ("pyarrow",)}
NEEDED["chain"] = ("pyarrow", "pandas", "psutil", "scipy", "tensorboard")
RATES = {
    "e1": 1e-4,
    "e2": 1e-4,
    "e3": 1e-5,
}  # the recipe's 2e-5, 2e-5, 2e-6 times five, for so small a model; not tuned
EPOCHS = {"e1": 4, "e2": 2, "e3": 2}
RACE_TRAIN = 87866  # questions in RACE's training split
FLOAT32_ERROR = 1e-3  # relative, for logits and for gradients
TIMES_THEIRS = 2.0  # how much more than Hugging Face's own bf16 ours may be off


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
    os.environ["RACE_BENCH_CACHE"] = str(options.carried)
    deadline = time.monotonic() + 60 * (options.minutes - 1)
    for name, run in PARTS[options.part](options).items():
        path = common.RESULTS / f"{name}{'-cuda' if options.device == 'cuda' else ''}.json"
        if path.exists():
            print(f"── {name}: done before, {path}")
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
    problems = [
        f"the package {name} is not installed" for name in NEEDED[options.part] if not importlib.util.find_spec(name)
    ]
    if options.device == "cuda" and not torch.cuda.is_available():
        problems.append("torch sees no CUDA GPU (--device cpu --small runs a small form)")
    if options.part != "parity" and not (options.carried / "manifest.json").exists():
        problems.append(f"{options.carried} is missing: run `bench/gpu_day.sh prepare` beforehand and take it along")
    return problems


# -------------------------------------------------------------------------------------------------- parity


def parity(options: argparse.Namespace) -> dict[str, Callable]:
    """Forward and gradients, and a loss curve."""
    return {"gpu_parity": lambda: gradients(options), "gpu_curve": lambda: curve(options)}


FAMILIES = ("albert", "bert", "roberta", "electra", "modernbert", "deberta-v2")
OWN = {
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 2},
    "electra": {"embedding_size": 128},
    "modernbert": {"local_attention": 64, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 128},
}


def small_config(family: str):
    """A small model of a family without dropout, with heads of 64 places as in the real ones."""
    from transformers import CONFIG_MAPPING

    sizes = {"vocab_size": 1000, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 3, "initializer_range": 0.05, "pad_token_id": 0} | OWN.get(family, {})
    default = CONFIG_MAPPING[family]().to_dict()
    none = {name: 0.0 for name, value in default.items() if "dropout" in name and isinstance(value, float)}
    return CONFIG_MAPPING[family](**sizes | none)


def random_items(questions: int, longest: int = 512, seed: int = 0) -> list[dict]:
    """Questions of random tokens and unequal lengths, as RaceDataset gives them."""
    rng, items = np.random.default_rng(seed), []
    for _ in range(questions):
        lengths = rng.integers(10, longest + 1, 4)
        segments = [np.repeat([0, 1], [length - 5, 5]) for length in lengths]
        ids = [rng.integers(5, 1000, length) for length in lengths]
        items.append({"input_ids": ids, "token_type_ids": segments, "label": int(rng.integers(4))})
    return items


def gradients(options: argparse.Namespace) -> dict:
    """Relative errors of logits and gradients on the device, float32 and bf16, from Hugging Face's in float64 on CPU.

    Raises RuntimeError where float32 is off by more than 0.1 %, or bf16 by twice what Hugging Face's own bf16 is.
    """
    items, errors, problems = random_items(*((3, 160) if options.small else (8, 512))), {}, []
    for family in FAMILIES:
        exact = _padded(family, items, "cpu", torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{family} {str(dtype).removeprefix('torch.')}"
            ours = relative_errors(_packed(family, items, options.device, dtype), exact)
            theirs = relative_errors(_padded(family, items, options.device, dtype), exact)
            errors[name] = {"ours": ours, "hugging_face": theirs}
            for kind in ours:
                allowed = FLOAT32_ERROR if dtype == torch.float32 else TIMES_THEIRS * theirs[kind]
                if not ours[kind] <= allowed:
                    problems.append(f"{name}, {kind}: off by {ours[kind]:.2g}, allowed {allowed:.2g}")
    if problems:
        raise RuntimeError("this repository differs from Hugging Face: " + "; ".join(problems))
    result = {"relative_errors": errors}
    common.report("gpu_parity", result, options.device)
    return result


def _padded(family: str, items: list[dict], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits and gradients of Hugging Face's model, padded."""
    from transformers import AutoModelForMultipleChoice

    from race.encoder import takes_segments

    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(small_config(family)).to(device).train()
    if dtype == torch.float64:
        model.double()
    batch = {name: tensor.to(device) for name, tensor in common.pad(items, None).items()}
    if not takes_segments(model):
        batch.pop("token_type_ids")
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(**batch).logits
    return _backward(model, logits, batch["labels"])


def _packed(family: str, items: list[dict], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits and gradients of RaceModule with the same weights, packed."""
    from transformers import AutoModelForMultipleChoice

    from race.data import collate
    from race.train.precision import autocast
    from race_module import RaceModule

    torch.manual_seed(0)
    module = RaceModule(config=small_config(family))
    torch.manual_seed(0)
    module.model.load_state_dict(AutoModelForMultipleChoice.from_config(small_config(family)).state_dict())
    batch = collate(items).to(device)
    module.to(device)
    with autocast(device, "32-true" if dtype == torch.float32 else "bf16-mixed"):
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
    there, here = (losses(steps, device, dtype)
                   for device, dtype in ((options.device, torch.bfloat16), ("cpu", torch.float32)))  # fmt: skip
    difference = max(abs(a - b) for a, b in zip(there, here, strict=True))
    if not difference <= 0.05:
        raise RuntimeError(f"the loss curves part: by {difference:.3f} within {steps} steps")
    result = {"steps": steps, "largest_difference": difference, "device": there, "cpu": here}
    common.report("gpu_curve", result, options.device)
    return result


def losses(steps: int, device: str, dtype: torch.dtype) -> list[float]:
    """The training losses of so many AdamW steps from the same weights on the same batches."""
    from race.data import collate
    from race.train.precision import autocast
    from race_module import RaceModule

    torch.manual_seed(0)
    module = RaceModule(config=small_config("albert"), learning_rate=1e-4).to(device).train()
    optimizer, values = module.configure_optimizers(), []
    for step in range(steps):
        batch = collate(random_items(8, longest=128, seed=step)).to(device)
        with autocast(device, "32-true" if dtype == torch.float32 else "bf16-mixed"):
            loss = F.cross_entropy(module(batch).float(), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values).tolist()


# -------------------------------------------------------------------------------------------------- speed


def speed(options: argparse.Namespace) -> dict[str, Callable]:
    """The benchmarks of this folder on the device, and an epoch of the trainer."""
    device, shape = ["--device", options.device], ["--shape", "tiny" if options.small else "base"]
    few = ["--questions", "4", "--rounds", "1"] if options.small else []
    suffix = "-tiny" if options.small else ""
    parts = {
        f"train_step{suffix}": lambda: train_step.main([*device, *shape, *few]),
        "gpu_epoch": lambda: epoch(options),
        f"evaluate{suffix}": lambda: evaluate.main([*device, *shape, *few]),
        "loader": lambda: loader.main([*device, "--batches", "5" if options.small else "300", "--rounds", "1"]),
    }
    if not options.small:
        for name in ("large", "xlarge"):
            parts[f"train_step-{name}"] = lambda name=name: train_step.main([*device, "--shape", name, "--rounds", "5"])
        parts["step_sizes"] = lambda: step_sizes(options)
    return parts


def step_sizes(options: argparse.Namespace) -> dict:
    """A step's seconds and memory by number of tokens, to hold against the token budget's formula."""
    result = {"shape": "base", "step": scaling.step_sizes(str(common.real_cache()), "base", options.device)}
    common.report("step_sizes", result, options.device)
    return result


def epoch(options: argparse.Namespace) -> dict:
    """Seconds a step of the trainer as a stage uses it, over 200 steps after 20, and what a RACE epoch would take."""
    import pytorch_lightning as pl

    from race.data import RaceDataModule
    from race_module import RaceModule

    warm_up, steps = (1, 3) if options.small else (20, 200)
    marks: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.global_step in (warm_up, warm_up + steps):
                if options.device == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

    data = RaceDataModule(options.carried, batch_size=2 if options.small else 32)
    module = RaceModule(config=common.albert_config("tiny" if options.small else "base", options.carried))
    precision = common.default_precision(options.device)
    common.trainer(precision, options.device, warm_up + steps, [Clock()]).fit(module, data)
    seconds = (marks[1] - marks[0]) / steps
    result = {"steps": steps, "questions_a_step": data.batch_size, "seconds_a_step": seconds, "precision": precision}
    result |= {"token_budget": module.token_budget, "race_epoch_seconds": seconds * -(-RACE_TRAIN // data.batch_size)}
    result["peak_mb"] = common.peak_mb()
    common.report("gpu_epoch", result, options.device)
    return result


# -------------------------------------------------------------------------------------------------- chain


def chain(options: argparse.Namespace) -> dict[str, Callable]:
    """The three stages, one after the other."""
    return {f"gpu_chain-{stage}": (lambda stage=stage: run_stage(stage, options)) for stage in RATES}


def run_stage(stage: str, options: argparse.Namespace) -> dict:
    """Train a stage as its notebook does, choose its best checkpoint on validation, score it on the test split.

    The carried cache's test split is RACE/dev; its validation split is held out of RACE/train.
    """
    from race.score.predict import predict
    from race.score.results import accuracy_table
    from race.train.stages import Stage
    from race.train.training import start_stage, train_stage

    folder, data = common.WORK / "gpu_day", _chain_data(options)
    place = Stage(stage, folder / "checkpoints", folder / "run")
    module = start_stage(place, options.carried, learning_rate=RATES[stage])
    started = time.perf_counter()
    trainer = train_stage(place, module, data, 1 if options.small else EPOCHS[stage], fresh=True)
    seconds = time.perf_counter() - started
    best = place.best()
    predictions = predict(best, options.carried, "test", limit_questions=data.limit_questions)
    table = accuracy_table(predictions, stage, best.name, "RACE/dev")
    scores = table.query("level == 'all'").iloc[0]
    result = {"stage": stage, "learning_rate": RATES[stage], "epochs": trainer.current_epoch, "seconds": seconds}
    result |= {"train_questions": len(data.dataset("train")), "checkpoint": best.name}
    result |= {name: float(scores[name]) for name in ("questions", "correct", "accuracy", "ci_low", "ci_high")}
    common.report(f"gpu_chain-{stage}", result, options.device)
    return result


def _chain_data(options: argparse.Namespace):
    from race.data import RaceDataModule

    return RaceDataModule(options.carried, batch_size=32, limit_questions=64 if options.small else None)


PARTS = {"parity": parity, "speed": speed, "chain": chain}

if __name__ == "__main__":
    sys.exit(main())
