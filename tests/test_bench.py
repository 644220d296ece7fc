"""The benchmarks run on a small scale and count what they say; a GPU day's parts go on where they stopped."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, padded

from bench import (
    carried,
    common,
    evaluate,
    families,
    gpu_day,
    loader,
    memory,
    part,
    scaling,
    startup,
    tables,
    train_step,
)
from race import SPLITS
from race.data import collate
from race.data.cache import verify_cache
from race.data.passages import read_source


@pytest.fixture
def results(tmp_path, monkeypatch, cache):
    """Results go to a folder of the test's own, and text comes from the small corpus."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(loader, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "WORK", tmp_path / "work")
    monkeypatch.setenv("RACE_BENCH_CACHE", str(cache))
    return tmp_path / "results"


@pytest.fixture
def in_process(monkeypatch):
    """The sides in this process, made anew before each call: a process of its own costs seconds to start."""

    @contextlib.contextmanager
    def processes(sides, setup, *arguments):
        yield {side: partial(call, side, setup, arguments) for side in sides}

    def call(side, setup, arguments, function, *its_arguments):
        setup(side, *arguments)
        return function(*its_arguments)

    for module in (train_step, evaluate, scaling):
        monkeypatch.setattr(module, "processes", processes)
    for module in (train_step, evaluate):
        monkeypatch.setattr(module, "matrix_rate", lambda *_: [1e12, 2e12, 3e12])  # takes seconds, too


def test_each_side_has_a_process_of_its_own():
    with common.processes(["a", "b"], str) as call:
        pids = {call[side](os.getpid) for side in ("a", "a", "b")}
        assert len(pids) == 2 and os.getpid() not in pids


def kept(results, name: str) -> dict:
    return json.loads((results / f"{name}.json").read_text())


def test_flops_are_those_of_the_products():
    """By hand: h 32, i 64, two layers, one sequence of 3 tokens."""
    per_token = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    attention = 4 * 32 * 9
    assert common.forward_flops("tiny", np.array([3]), last_layer_at_cls=False) == 2 * (3 * per_token + attention)
    keys_and_values = 3 * 2 * (2 * 32 * 32)
    at_cls = 2 * (2 * 32 * 32 + 2 * 32 * 64) + 4 * 32 * 3
    expected = 3 * per_token + attention + keys_and_values + at_cls
    assert common.forward_flops("tiny", np.array([3]), last_layer_at_cls=True) == expected


def test_counted_flops_are_those_that_torch_counts(cache, items):
    """Torch's own counter sees the matrix products that ours computes, attention written out as products too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from race_module import RaceModule

    module, batch = RaceModule(config=common.albert_config("tiny", cache)), collate(items(2, longest=300))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(batch)
    lengths = np.array(batch.lengths)
    head = 2 * lengths.sum() * 128 * 32 + 2 * len(lengths) * (32 * 32 + 32)  # embedding projection, pooler, classifier
    expected = common.forward_flops("tiny", lengths, last_layer_at_cls=True) + head
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_the_reference_gets_the_padded_batch(items):
    made = items(3)
    ours, theirs = common.pad(made, None), padded(collate(made))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert common.pad(made, 512)["input_ids"].shape == (3, 4, 512)


@pytest.mark.parametrize("neighbours", [1, 4])
def test_draws_are_as_long_as_their_split(cache, neighbours):
    """Of every stratum by length one draw, of neighbours in the order of the split."""
    from race.data.module import RaceDataset

    dataset = RaceDataset(cache, "train")
    rows = common.drawn(dataset, 24, neighbours)
    assert len(set(rows.tolist())) == 24 and (np.diff(rows.reshape(-1, neighbours)) == 1).all()
    lengths = dataset.lengths().sum(1)
    plain = [np.random.default_rng(seed).choice(lengths, 24).mean() for seed in range(200)]
    assert abs(lengths[rows].mean() - lengths.mean()) < 2 * np.std(plain)
    assert (rows == common.drawn(dataset, 24, neighbours)).all()
    assert (common.drawn(dataset, 24, neighbours, seed=1) != rows).any()
    with pytest.raises(ValueError, match="wanted"):
        common.drawn(dataset, len(dataset) + neighbours, neighbours)


def test_train_step_and_evaluate(results, in_process):
    step = train_step.main(["--shape", "tiny", "--questions", "5"])
    score = evaluate.main(["--shape", "tiny", "--questions", "6", "--rounds", "1"])
    for name, result in (("train_step-tiny", step), ("evaluate-tiny", score)):
        assert kept(results, name)["sides"].keys() == result["sides"].keys() == set(train_step.SIDES)
        assert all(side["questions_per_second"]["median"] > 0 for side in result["sides"].values())
        assert result["matrix_product_gflops"]["median"] == 2000.0
        assert 0 < result["sides"]["ours"]["share_of_matrix_product"] < 1


def test_families_are_held_against_hugging_face(results, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    monkeypatch.setattr(families, "SHAPE", sizes)
    families.main(["--families", "bert", "mpnet", families.WITH_DROPOUT, "--questions", "4", "--group", "2"])
    kept_ones = kept(results, "families")["families"]
    assert list(kept_ones) == ["bert", "mpnet", families.WITH_DROPOUT]
    assert all(ratios["ratios"]["padded to 512"]["median"] > 1 for ratios in kept_ones.values())
    monkeypatch.setattr(tables, "RESULTS", results)
    assert "| mpnet | padded | " in tables.families()


def test_bf16_on_cpu_is_held_against_fp32(results, in_process):
    few = ["--shape", "tiny", "--questions", "4", "--precision", "bf16-mixed"]
    for name, result in (
        ("train_step-tiny-bf16", train_step.main(few)),
        ("evaluate-tiny-bf16", evaluate.main([*few, "--rounds", "1"])),
    ):
        machine = kept(results, name)["machine"]
        assert {type(machine[instructions]) for instructions in common.BF16_INSTRUCTIONS} == {bool}
        assert result["precision"] == "bf16-mixed" and result["sides"].keys() == {*common.SIDES, common.OURS_FP32}
        assert result["ratios"].keys() == set(result["sides"]) - {common.OURS}
        assert "share_of_matrix_product" not in result["sides"][common.OURS_FP32]


def test_answers_of_a_checkpoint_in_bf16_and_fp32(results, cache, tmp_path):
    from pytorch_lightning import Trainer

    from race_module import RaceModule

    torch.manual_seed(0)
    config = common.albert_config("tiny", cache)
    config.initializer_range = 0.2
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(RaceModule(config=config))
    trainer.save_checkpoint(tmp_path / "e1.ckpt", weights_only=True)
    result = evaluate.main(["--checkpoint", str(tmp_path / "e1.ckpt"), "--questions", "16"])
    assert kept(results, "answers")["questions"] == 16 and result["checkpoint"] == "e1.ckpt"
    assert 0 < result["largest_difference"] < 0.1 and 0 <= result["share_that_differ"] < 0.5


@pytest.mark.parametrize("side", [common.OURS, common.SIDES[1]])
def test_a_side_that_runs_out_of_memory_is_a_result(results, in_process, monkeypatch, side):
    backward = train_step._backward

    def full(items, of):
        if of == side:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward(items, of)

    monkeypatch.setattr(train_step, "_backward", full)
    result = train_step.main(["--shape", "tiny", "--questions", "4"])
    assert result["sides"][side] == {"out_of_memory": True} and result["sides"].keys() == set(common.SIDES)
    assert result["ratios"].keys() == (set() if side == common.OURS else {common.SIDES[2]})
    monkeypatch.setattr(tables, "RESULTS", results)
    os.replace(results / "train_step-tiny.json", results / "train_step-cuda.json")
    assert tables.OUT in tables.sides("train_step-cuda") and tables.OUT in tables.gpu()


@pytest.mark.parametrize("side", train_step.SIDES[1:])
def test_all_sides_compute_the_same(results, cache, side):
    """The sides of the step: equal gradients. The sides of scoring: equal probabilities, each in its own order."""
    import argparse

    options = argparse.Namespace(shape="tiny", device="cpu", precision="32-true", questions=6, group=4, compile=False)
    found = {}
    for name in (train_step.OURS, side):
        train_step.setup(name, str(cache), options)
        train_step.backward(0, 6, name)
        parameters = dict(train_step.STATE["model"].named_parameters())
        gradients = {key.removeprefix("model."): parameter.grad.clone() for key, parameter in parameters.items()}
        evaluate.setup(name, str(cache), options)
        ours = (evaluate.STATE["model"], evaluate.STATE["data"], name, options)
        scores = evaluate._ours(*ours) if name == train_step.OURS else evaluate._reference(name)
        found[name] = gradients, torch.tensor(scores)
    ours, theirs = found[train_step.OURS], found[side]
    assert max((ours[0][name] - theirs[0][name]).abs().max() for name in theirs[0]) < 1e-5
    order = evaluate.STATE["data"].dataset("validation").length_order()
    assert torch.allclose(ours[1], theirs[1][order], atol=1e-5) and theirs[1].std() > 0


def test_compile_is_that_of_training(results, in_process, monkeypatch):
    from race import encoder

    compiled = []
    monkeypatch.setattr(encoder, "compile_layers", compiled.append)
    assert train_step.main(["--shape", "tiny", "--questions", "4", "--compile"])["compile"] and compiled


def test_loader_is_held_against_the_step(results):
    assert loader.main(["--batches", "2", "--rounds", "1", "--workers", "0"])["workers"]["0"]["questions_per_second"]
    assert loader.seconds_a_question("cpu") is None
    step = {"sides": {"ours": {"questions_per_second": {"median": 0.25}}}}
    (results / "train_step.json").write_text(json.dumps(step))
    assert loader.seconds_a_question("cpu") == 4.0


def test_scaling_steps_have_the_tokens_they_are_asked_for(results, cache, in_process):
    rows = scaling.step_sizes(str(cache), "tiny", "cpu", [512, 2048])
    assert [row["tokens"] for row in rows] == [512, 2048] and all(row["seconds"] > 0 for row in rows)


def test_the_questions_for_two_processes_are_alike(cache):
    lengths = np.array(scaling.near_median(str(cache), 4))
    assert lengths.shape == (4, 4) and np.ptp(lengths.sum(1)) <= 8


def test_slowest_imports_are_added_up_by_package():
    lines = ["import time: self [us] | cumulative | imported package", "import time:      100 |        100 | torch.nn"]
    lines += ["import time:       50 |        150 |   torch", "import time:       20 |         20 | scipy"]
    assert startup.slowest("\n".join(lines), count=1) == {"torch": pytest.approx(150e-6)}


def test_the_page_says_what_was_measured():
    """The tables of bench/README.md are those of the kept results; `python -m bench.tables` writes them."""
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page and "16 questions" in page


def test_a_page_without_a_place_for_a_table_is_named():
    with pytest.raises(ValueError, match="no place for the table cache"):
        tables.filled("# Measurements")


@pytest.mark.parametrize("lengths", memory.LENGTHS)
def test_memory_is_measured_on_questions_of_these_lengths(lengths):
    batch = collate(memory.Questions(lengths, 2)[1])
    assert len(batch) == memory.QUESTIONS and 60 <= min(batch.lengths) and batch.max_seqlen <= 512
    assert batch.lengths == collate(memory.Questions(lengths, 2)[1]).lengths


def test_memory_runs_each_case_once(results, tmp_path, monkeypatch):
    """Each in a process of its own, which the launcher starts for its card; what failed is run again."""
    program = f"""
import json, sys
gb, capability, _, _, *rest = sys.argv[1:]
if (gb, capability) == ("8", "7.5"):
    sys.exit(1)
given = dict(zip(rest[::2], rest[1::2]))
row = {{name: given["--" + name] for name in ("shape", "precision", "lengths")}} | {{"card_gb": int(given["--card"])}}
open({str(results / "memory.jsonl")!r}, "a").write(json.dumps(row) + chr(10))
"""
    (tmp_path / "launcher.py").write_text(program)
    results.mkdir(parents=True)
    monkeypatch.setenv("BENCH_LAUNCHER", f"{sys.executable} {tmp_path / 'launcher.py'} {{gb}} {{capability}}")
    few = ["--shape", "base", "--lengths", "race", "--precision", "bf16-mixed", "16-mixed", "--cards", "8", "16"]
    assert memory.main(few) == 1  # of four
    cases = [(row["precision"], row["card_gb"]) for row in memory.kept()]
    assert cases == [("bf16-mixed", 8), ("bf16-mixed", 16), ("16-mixed", 16)]
    assert memory.main(few) == 1 and len(memory.kept()) == 3


def test_the_table_of_memory_shows_each_case(results, monkeypatch):
    results.mkdir(parents=True)
    row = {"shape": "base", "precision": "32-true", "card_gb": 8, "micro_batches": 3}
    row |= {"peak_gb": 6.0, "reserved_gb": 7.0}
    rows = [row | {"lengths": lengths, "out_of_memory": lengths == "race"} for lengths in memory.LENGTHS]
    (results / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "RESULTS", results)
    assert f"| ALBERT base, 32-true | out / 3 / 3; 6.0, 7.0 | {tables.YET} |" in tables.memory()


# -------------------------------------------------------------------------------------------------- a day with a GPU

SMALL = ["--device", "cpu", "--small"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What `prepare` makes, from the demo's corpus and model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carried, "source", lambda: "demo")
        out = tmp_path_factory.mktemp("carried") / "carried"
        carried.prepare(out, small=True)
    return out


def test_the_carried_folder_is_a_cache_without_text(folder):
    from safetensors.torch import load_file

    from race.data.module import RaceDataset

    assert verify_cache(folder) == []
    train, test = RaceDataset(folder, "train"), RaceDataset(folder, "test")
    assert len(train) > len(test) > 0 and len(train[0]["input_ids"][0]) > 20
    assert train.text(0)["article"] == "" and train.text(0)["options"] == [""] * 4
    assert {tensor.dtype for tensor in load_file(folder / "model" / "model.safetensors").values()} == {torch.float16}


def test_the_carried_folder_may_not_be_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "source", lambda: "demo")
    monkeypatch.setattr(carried, "LIMIT", 1000)
    with pytest.raises(RuntimeError, match="lower PASSAGES"):
        carried.prepare(tmp_path / "carried", small=True)
    assert not (tmp_path / "carried").exists()


def test_parity_on_this_device(results):
    assert gpu_day.main(["parity", *SMALL]) == 0
    errors = kept(results, "gpu_parity")["relative_errors"]
    assert errors.keys() == {f"{family} {dtype}" for family in gpu_day.FAMILIES for dtype in ("float32", "bfloat16")}
    assert errors["albert float32"]["ours"]["gradients"] < 1e-4 < errors["albert bfloat16"]["ours"]["gradients"] < 0.1
    assert kept(results, "gpu_curve")["largest_difference"] < 0.05


def test_parity_finds_a_wrong_attention(results, monkeypatch):
    from transformers import AttentionInterface

    from race.encoder import packed_attention

    def wrong(*arguments, **settings):
        out, weights = packed_attention(*arguments, **settings)
        return out.roll(1, 1), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", wrong)
    with pytest.raises(RuntimeError, match="this repository differs"):
        gpu_day.main(["parity", *SMALL])
    assert not (results / "gpu_parity.json").exists()


def test_speed_and_chain_go_on_where_they_stopped(results, folder, capsys):
    arguments = [*SMALL, "--carried", str(folder)]
    assert gpu_day.main(["speed", *arguments, "--minutes", "0"]) == 2  # no time for anything
    assert not results.exists() and "call again" in capsys.readouterr().out
    assert gpu_day.main(["chain", *arguments]) == 0
    stages = [kept(results, f"gpu_chain-{stage}") for stage in ("e1", "e2", "e3")]
    assert [stage["learning_rate"] for stage in stages] == [1e-4, 1e-4, 1e-5]
    assert all(stage["ci_low"] < stage["accuracy"] < stage["ci_high"] for stage in stages)
    assert gpu_day.main(["chain", *arguments]) == 0
    assert capsys.readouterr().out.count("done before") == 3


def test_speed_measures_an_epoch_of_the_trainer(results, folder, monkeypatch):
    for name in ("train_step", "evaluate", "loader"):  # tested above
        monkeypatch.setattr(getattr(gpu_day, name), "main", lambda *_: None)
    assert gpu_day.main(["speed", *SMALL, "--carried", str(folder)]) == 0
    result = kept(results, "gpu_epoch")
    assert result["race_epoch_seconds"] == pytest.approx(result["seconds_a_step"] * 43933)


NOT_THERE = ("datasets", "pandas", "psutil", "tensorboard", "IPython", "ipywidgets", "jinja2")


@pytest.mark.parametrize("part", ["parity", "speed"])
def test_rehearsal_of_what_is_carried(folder, tmp_path, part):
    """The program's files in a folder of their own, on a machine that has few packages: parity lacks pyarrow, too."""
    for name in ("bench", "race", "race_module.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    missing = NOT_THERE if part == "speed" else (*NOT_THERE, "pyarrow")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({missing})\n")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "RACE_BENCH_RESULTS": "results"}
    command = [tmp_path / "bench" / "gpu_day.sh", part, *SMALL, "--carried", folder]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    parts = {"parity": {"gpu_parity", "gpu_curve"}}
    parts["speed"] = {"train_step-tiny", "gpu_epoch", "evaluate-tiny", "loader"}
    assert {path.stem for path in (tmp_path / "results").iterdir()} == parts[part]


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_day.main(["chain", "--carried", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "pandas is not installed" in message and "prepare" in message


def test_a_part_of_a_source_is_short_and_in_three_splits_that_share_nothing(corpus, tmp_path):
    part.main([str(corpus), str(tmp_path / "part"), "--longest", "60", "--questions", "20", "8", "12"])
    passages, _ = read_source(str(tmp_path / "part"))
    assert [
        sum(len(it.questions) for it in passages[split]) >= least
        for split, least in zip(SPLITS, (20, 8, 12), strict=False)
    ] == [True] * 3
    every = [it for found in passages.values() for it in found]
    assert max(len(it.article.split()) for it in every) <= 60 and len({it.example_id for it in every}) == len(every)
    whole = {it.article: it for found in read_source(str(corpus))[0].values() for it in found}
    assert all(whole[it.article].questions == it.questions and whole[it.article].labels == it.labels for it in every)
