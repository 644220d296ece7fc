# The chain inside a batch job: one step a stage, and the job back into the queue when its time runs out.
# Sourced by the batch files beside it. A stage that is finished trains nothing, so a job begins at the top each time.

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
RUN=runs/race # as in the notebooks' parameters
BIN=${BIN:-.venv/bin}
export PYTHONPATH=$PWD MPLBACKEND=agg PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-4}
mkdir -p "$RUN/scripts"

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
  if [ -n "$stopped" ] || [ "$status" -eq 138 ] || [ "$status" -eq 143 ]; then
    echo "stopped with the state saved: requeued, to resume"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  elif [ "$status" -ne 0 ]; then
    echo "failed (status $status): srun $*"
    exit "$status"
  fi
}

for stage in ex01 ex02 ex03; do
  "$BIN/jupyter" nbconvert --to script --log-level WARN --output-dir "$RUN/scripts" "$stage.ipynb" || exit 1
  run "$BIN/python" "$RUN/scripts/$stage.py"
done
for notebook in eval_test_dataset_race eval_test_dataset_race_2; do
  run --nodes=1 --ntasks=1 "$BIN/papermill" "$notebook.ipynb" "$RUN/$notebook.ipynb" --no-progress-bar
done
cat "$RUN/results.csv"
