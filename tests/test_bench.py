"""The benchmarks run on a small scale and count what they say; a GPU day's parts go on where they stopped."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, padded
from kill import in_a_process
from small_stage import At, position, stage

from bench import carried, common, evaluate, families, gpu_day, tables, train_step


@pytest.fixture
def results(tmp_path, monkeypatch, cache):
    """Results go to a folder of the test's own, and text comes from the small corpus."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "WORK", tmp_path / "work")
    monkeypatch.setenv("RACE_BENCH_CACHE", str(cache))
    return tmp_path / "results"


@pytest.fixture
def in_process(monkeypatch):
    """The sides in this process, made anew before each call: a process of its own costs seconds to start."""

    @contextlib.contextmanager
    def processes(options, setup, cache):
        yield {side: partial(call, side, setup, cache, options) for side in common.sides_of(options)}

    def call(side, setup, cache, options, function, *arguments):
        setup(side, cache, options)
        return function(*arguments)

    monkeypatch.setattr(common, "processes", processes)
    monkeypatch.setattr(common, "matrix_rate", lambda *_: [1e12, 2e12, 3e12])  # takes seconds, too


def test_counted_flops_are_those_that_torch_counts(cache, items):
    """Torch's own counter sees the matrix products that ours computes, attention written out as products too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    module, made = common.RaceModule(config=common.albert_config("tiny", cache)), items(2, longest=300)
    batch = common.collate(made)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(batch)
    ours, theirs = common.pad(made, None), padded(batch)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # and the reference gets the same batch
    lengths = np.array(batch.lengths)
    head = 2 * lengths.sum() * 128 * 32 + 2 * len(lengths) * (32 * 32 + 32)  # embedding projection, pooler, classifier
    expected = common.forward_flops("tiny", lengths, last_layer_at_cls=True) + head
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
    in_full = 2 * (3 * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 32 * 9)  # h 32, i 64, two layers, one sequence of 3 tokens
    assert common.forward_flops("tiny", np.array([3]), last_layer_at_cls=False) == in_full


def test_draws_are_as_long_as_their_split(cache, neighbours=4):
    """Of every stratum by length one draw, of neighbours in the order of the split."""
    dataset = common.RaceDataset(cache, "train")
    rows = common.drawn(dataset, 24, neighbours)
    assert len(set(rows.tolist())) == 24 and (np.diff(rows.reshape(-1, neighbours)) == 1).all()
    assert abs(dataset.lengths()[rows].mean() / dataset.lengths().mean() - 1) < 0.05


def test_train_step_and_evaluate(results, in_process):
    """In bf16, beside which the same in float32 is measured."""
    sides = {*common.SIDES, common.OURS_FP32}
    for program, name in ((train_step, "train_step"), (evaluate, "evaluate")):
        result = program.main(["--shape", "tiny", "--questions", "5", "--precision", "bf16-mixed", "--rounds", "1"])
        assert result["sides"].keys() == sides and result["ratios"].keys() == sides - {common.OURS}
        assert 0 < result["sides"]["ours"]["share_of_matrix_product"] < 1
        assert "| Hugging Face, padded to 512 |" in tables.sides(common.kept_result(f"{name}-tiny-bf16"))


def test_a_side_that_runs_out_of_memory_is_a_result(results, in_process, monkeypatch):
    side, backward = common.SIDES[1], train_step._backward

    def full(items, of):
        if of == side:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(items, of)

    monkeypatch.setattr(train_step, "_backward", full)
    result = train_step.main(["--shape", "tiny", "--questions", "4", "--rounds", "1"])
    assert result["sides"][side] == {"out_of_memory": True} and result["sides"].keys() == set(common.SIDES)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    common.report("train_step", result, "cuda")
    assert tables.OUT in tables.sides(common.kept_result("train_step", "cuda"))
    assert tables.OUT in tables.gpu() and "a card" in tables.gpu()


def test_families_are_held_against_hugging_face(results, monkeypatch):
    monkeypatch.setattr(families, "SHAPE", dict(zip(families.SHAPE, common.SHAPES["tiny"], strict=True)))
    families.main(["--families", "bert", "mpnet", "--questions", "4", "--group", "2"])
    kept = common.kept_result("families")
    assert kept["families"].keys() == {"bert", "mpnet"}
    assert "| mpnet | padded | " in tables.families(kept)


def test_answers_of_a_checkpoint_in_bf16_and_fp32(results, monkeypatch):
    before = ROOT / "tests" / "before_1_5" / "albert"
    monkeypatch.setenv("RACE_BENCH_CACHE", str(before / "cache"))
    checkpoint = next((before / "checkpoints").glob("e1*.ckpt"))
    result = evaluate.main(["--checkpoint", str(checkpoint), "--questions", "8"])
    assert common.kept_result("answers")["questions"] == 8 and result["checkpoint"] == checkpoint.name
    assert 0 < result["largest_difference"] < 0.1


def test_the_page_says_what_was_measured():
    """Of the kept results; `python -m bench.tables` writes the tables of bench/README.md."""
    assert tables.filled(tables.PAGE.read_text()) == tables.PAGE.read_text()


SMALL = ["--device", "cpu", "--small"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `prepare` makes, from the demo's corpus and model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "at_hand", lambda name: "demo")
        out = tmp_path_factory.mktemp("carried") / "carried"
        carried.prepare(out, small=True)
    return out


def test_a_wrong_step_is_found_and_kept_and_the_rest_is_measured(results, folder, monkeypatch):
    packed, after = gpu_day._packed, []
    monkeypatch.setattr(gpu_day, "FAMILIES", ("albert",))  # the rehearsal below has them all
    monkeypatch.setattr(gpu_day, "_packed", lambda *it: {name: 1.01 * value for name, value in packed(*it).items()})
    parts = {"gpu_parity": partial(gpu_day.gradients, gpu_day.argparse.Namespace(small=True, device="cpu"))}
    monkeypatch.setitem(gpu_day.PARTS, "measure", lambda _: parts | {"another": lambda: after.append(True)})
    assert gpu_day.main(["measure", *SMALL, "--carried", str(folder)]) == 1 and after
    assert "albert float32, logits: off by 0.01" in common.kept_result("gpu_parity")["problems"][0]
    assert common.RESULTS == results / "small"  # none takes a rehearsal for a result


def test_training_on_a_gpu_day_goes_on_where_it_stopped(results, folder, capsys, monkeypatch):
    assert common.RaceDataset(folder, "train").text(0)["article"] == ""  # no text of RACE is taken along
    monkeypatch.setattr(train_step, "main", lambda arguments: common.report("train_step-tiny-compile", {"kept": True}))
    arguments = ["train", *SMALL, "--carried", str(folder)]
    assert gpu_day.main(arguments) == 0
    rates = [common.kept_result(f"gpu_chain-seed2-{stage}")["learning_rate"] for stage in ("e1", "e2", "e3")]
    assert rates == [1e-4, 1e-4, 1e-5] and common.kept_result("gpu_linear-seed1-e1")["schedule"] == "linear"
    assert gpu_day.main(arguments) == 0 and capsys.readouterr().out.count("done before") == 9


def test_when_the_time_of_a_call_is_up_a_stage_is_saved(cache, tmp_path):
    def call() -> None:
        with gpu_day.time_limit(600):  # the time is up at the third step, however long it took to come there
            stage(tmp_path, cache, At(2, lambda *_: signal.setitimer(signal.ITIMER_REAL, 1e-6) and time.sleep(0.1)))

    process = in_a_process(call)
    process.join(120)
    assert process.exitcode == -signal.SIGTERM and 0 < position(tmp_path)["steps"] < 16


def test_rehearsal_of_what_is_carried(folder, tmp_path):
    """The program's files in a folder of their own, on a machine that lacks some of the packages."""
    for name in ("bench", "race", "race_module.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    missing = ["datasets", "IPython", "ipywidgets"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({missing})\n")
    (tmp_path / "results" / "small").mkdir(parents=True)
    for name in ("train_step-tiny", "evaluate-tiny"):  # done before: tested above
        (tmp_path / "results" / "small" / f"{name}.json").write_text('{"kept": true}')
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "RACE_BENCH_RESULTS": "results"}
    command = [tmp_path / "bench" / "gpu_day.sh", "measure", *SMALL, "--carried", folder]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(list((tmp_path / "results" / "small").iterdir())) == 5
