# The chain inside a batch job: one step a stage, and the job back into the queue when its time runs out.
# Sourced by the batch files beside it. A stage that is finished trains nothing, so a job begins at the top each time.
# What follows the file's name goes to every stage and to the evaluations: sbatch slurm/one_gpu.sh --set MAX_EPOCHS=3

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
SCRIPTS=runs/race/scripts
BIN=${BIN:-.venv/bin}
export PYTHONPATH=$PWD MPLBACKEND=agg PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-4}
mkdir -p "$SCRIPTS"

stopped=
trap 'stopped=1; [ -n "$step" ] && kill -USR1 "$step"' USR1

run() { # one step; srun passes the signal on to its processes, and ends all when one has ended badly
  if [ -z "$stopped" ]; then
    srun --kill-on-bad-exit=1 "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
      wait "$step"
      status=$?
    done
    step=
  fi
  if [ -n "$stopped" ] || [ "$status" -eq 138 ] || [ "$status" -eq 143 ] || [ "$status" -eq 75 ]; then
    echo "stopped with the state saved: requeued, to resume"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  elif [ "$status" -ne 0 ]; then
    echo "failed (status $status): srun $*"
    exit "$status"
  fi
}

for stage in ex01 ex02 ex03; do
  "$BIN/jupyter" nbconvert --to python --log-level WARN --output-dir "$SCRIPTS" "$stage.ipynb" || exit 1
  run "$BIN/python" "$SCRIPTS/$stage.py" "$@"
done
run --nodes=1 --ntasks=1 "$BIN/python" -m race.chain race --stages "$@"
