# The chain inside a batch job: one step a stage, and the job back into the queue when its time runs out.
# Sourced by the batch files beside it. A stage that is finished trains nothing, so a job begins at the top each time.

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
RUN=${RUN:-runs/race}
BIN=${BIN:-.venv/bin}
export PYTHONPATH=$PWD MPLBACKEND=agg PYTHONUNBUFFERED=1
mkdir -p "$RUN/scripts"

for stage in ex01 ex02 ex03; do
  "$BIN/jupyter" nbconvert --to script --log-level WARN --output-dir "$RUN/scripts" "$stage.ipynb" || exit 1
  srun "$BIN/python" "$RUN/scripts/$stage.py"
  status=$?
  if [ "$status" -ge 128 ]; then # ended by a signal: the state is saved
    echo "$stage was stopped (status $status): back into the queue, to go on from its state"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  elif [ "$status" -ne 0 ]; then
    echo "$stage failed (status $status)"
    exit "$status"
  fi
done

for notebook in eval_test_dataset_race eval_test_dataset_race_2; do
  srun --nodes=1 --ntasks=1 "$BIN/papermill" "$notebook.ipynb" "$RUN/$notebook.ipynb" --no-progress-bar || exit 1
done
cat "$RUN/results.csv"
