"""The batch files, with stand-ins for Slurm: requeued when stopped, ended when failed, done after the evaluations."""

import os
import subprocess

import pytest
from conftest import ROOT

FILES = ("one_gpu", "one_node", "several_nodes")


@pytest.fixture
def job(tmp_path):
    """job(*statuses) -> (exit status, the calls of srun and scontrol); srun gives these statuses in turn, then 0."""
    for name in ("bin", "slurm", "runs/race"):
        (tmp_path / name).mkdir(parents=True)
    for path in (ROOT / "slurm").iterdir():
        (tmp_path / "slurm" / path.name).write_text(path.read_text())
    (tmp_path / "runs" / "race" / "results.csv").write_text("stage\n")
    programs = {
        "srun": 'echo "srun $*" >> calls; s=$(head -1 statuses); sed -i 1d statuses; exit "${s:-0}"\n',
        "scontrol": 'echo "scontrol $*" >> calls\n',
        "jupyter": "exit 0\n",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*statuses: int, file: str = "one_gpu"):
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        own = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42", "BIN": "bin"}
        environment = os.environ | own | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        ended = subprocess.run(["bash", f"slurm/{file}.sh"], cwd=tmp_path, env=environment, capture_output=True)
        return ended.returncode, (tmp_path / "calls").read_text().splitlines()

    return run


@pytest.mark.parametrize("file", FILES)
def test_a_job_that_is_not_stopped_does_everything(job, file):
    status, calls = job(file=file)
    assert status == 0 and [call.split()[-1].rsplit("/")[-1] for call in calls[:3]] == ["ex01.py", "ex02.py", "ex03.py"]
    assert ["eval_test_dataset_race" in call for call in calls[3:]] == [True, True]
    assert all(call.startswith("srun --nodes=1 --ntasks=1 ") for call in calls[3:])


@pytest.mark.parametrize("signal_status", [138, 143])
def test_a_stopped_stage_goes_back_into_the_queue(job, signal_status):
    status, calls = job(0, signal_status)
    assert status == 0 and calls[-1] == "scontrol requeue 42" and len(calls) == 3


def test_a_failed_stage_is_not_tried_again(job):
    status, calls = job(1)
    assert status == 1 and len(calls) == 1


@pytest.mark.parametrize("file", FILES)
def test_the_signal_comes_before_the_limit_and_to_the_processes(file):
    text = (ROOT / "slurm" / f"{file}.sh").read_text()
    assert "#SBATCH --signal=USR1@180" in text and "#SBATCH --requeue" in text
