"""The batch files, with stand-ins for Slurm: requeued when stopped, ended when failed, done after the evaluations."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

FILES = ("one_gpu", "one_node", "several_nodes")
SRUN = """
echo "srun $*" >> calls
s=$(head -1 statuses); sed -i 1d statuses
if [ "$s" = usr1 ]; then  # the batch shell gets its signal while a step runs, and passes it on
  trap 'echo "step got USR1" >> calls; exit 138' USR1
  kill -USR1 "$PPID"
  for i in $(seq 100); do sleep 0.1; done
  exit 1
fi
exit "${s:-0}"
"""


@pytest.fixture
def job(tmp_path):
    """job(*statuses) -> (exit status, the calls of srun and scontrol); srun gives these statuses in turn, then 0."""
    for name in ("bin", "slurm", "runs/race"):
        (tmp_path / name).mkdir(parents=True)
    for path in (ROOT / "slurm").iterdir():
        (tmp_path / "slurm" / path.name).write_text(path.read_text())
    programs = {"srun": SRUN, "scontrol": 'echo "scontrol $*" >> calls\n', "jupyter": "exit 0\n"}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*statuses, file: str = "one_gpu", given=()):
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        own = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42", "BIN": "bin"}
        environment = os.environ | own | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        ended = subprocess.run(["bash", f"slurm/{file}.sh", *given], cwd=tmp_path, env=environment, capture_output=True)
        return ended.returncode, (tmp_path / "calls").read_text().splitlines()

    return run


def test_a_notebook_becomes_a_script(job, tmp_path):
    """By the real nbconvert, which chooses another suffix if it does not know the language."""
    shutil.copy(ROOT / "ex01.ipynb", tmp_path)
    (tmp_path / "bin" / "jupyter").write_text(
        f'#!/bin/bash\n[[ "$*" != *ex01.ipynb ]] || exec {sys.executable} -m jupyter "$@"\n'
    )
    status, calls = job()
    assert status == 0
    assert "train_stage(stage, module, data" in (tmp_path / calls[0].split()[-1]).read_text()


@pytest.mark.parametrize("file", FILES)
def test_a_job_that_is_not_stopped_does_everything(job, file):
    given = ["--set", "MAX_EPOCHS=3", "e3.LEARNING_RATE=1e-6"]
    status, calls = job(file=file, given=given)
    assert status == 0 and [call.split()[3].rsplit("/")[-1] for call in calls[:3]] == ["ex01.py", "ex02.py", "ex03.py"]
    assert len(calls) == 4 and "--nodes=1 --ntasks=1 " in calls[3] and "-m race.chain race --stages --set" in calls[3]
    assert all(call.endswith(" ".join(given)) for call in calls)


@pytest.mark.parametrize("statuses", [(0, 138), (0, 143), (0, 0, 0, 75)])
def test_what_is_stopped_goes_back_into_the_queue(job, statuses):
    status, calls = job(*statuses)
    assert status == 0 and calls[-1] == "scontrol requeue 42" and len(calls) == len(statuses) + 1


@pytest.mark.parametrize("file", FILES)
def test_the_signal_comes_before_the_limit_and_reaches_the_step(job, file):
    text = (ROOT / "slurm" / f"{file}.sh").read_text()
    assert "#SBATCH --signal=B:USR1@180" in text and "#SBATCH --requeue" in text
    status, calls = job(0, "usr1", file=file)
    assert status == 0 and calls[-2:] == ["step got USR1", "scontrol requeue 42"] and len(calls) == 4


@pytest.mark.parametrize("failure", [1, 137])
def test_a_failed_stage_is_not_tried_again(job, failure):
    """An exception, or out of memory: trying again for ever would help nobody."""
    status, calls = job(failure)
    assert status == failure and len(calls) == 1
