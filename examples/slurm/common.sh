# Sourced by every script of this folder: settings, the way into the container, rendezvous, steps. end_job.sh, which it
# sources, decides how a job ends. (DRY_RUN=1: print the commands, run nothing.)
#
#   require NAME...        end with a message where a variable is missing
#   launch COMMAND...      run a Python command in every task; then end the job: done, started again, or given up
#   run_step COMMAND...    the same, and come back with its exit status in `status`
#   check_nodes FLAG...    tools/preflight.py in every task; a bad node is excluded and the job started again without it
#   train PRESET TP FLAG.. the whole of a training script
#
# A script defines progress(): what it prints is another text when the job has got on.
# shellcheck shell=bash
set -euo pipefail
set -a
# shellcheck source=examples/slurm/cluster.env
. "${CLUSTER_ENV:-$LEDOM_HOME/examples/slurm/cluster.env}"
set +a
cd "$LEDOM_HOME"
job=${SLURM_JOB_ID:-0} restarts=${SLURM_RESTART_COUNT:-0} step="" stopped_by="" status=0
number=$job
# The last task of an array has the whole array's number: by that name all tasks would be looked up, and requeued.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
state_file=${STATE_DIR:-$LEDOM_HOME/runs/slurm}/job-$job
# shellcheck source=examples/slurm/end_job.sh
. "$LEDOM_HOME/examples/slurm/end_job.sh"

require() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || refuse "$name is not set; what it means is written at the top of the script"
  done
}

# Rendezvous on the job's first node. The port lies below the ephemeral ones and changes with job and restart.
export MASTER_ADDR=localhost MASTER_PORT=$((15000 + (number * 7 + restarts) % 15000))
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${nodes[0]}
fi
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun forgets it since 22.05

srun=(srun --kill-on-bad-exit=1) # a rank that dies ends the step, instead of leaving the others in a collective
case $RUNTIME in
  venv) inside=("$VENV/bin/python") ;;
  apptainer)
    require IMAGE
    inside=(apptainer exec --nv --bind "$MOUNTS" --pwd "$LEDOM_HOME" "$IMAGE" python)
    ;;
  pyxis)
    require IMAGE
    mounts=()
    for folder in ${MOUNTS//,/ }; do mounts+=("$folder:$folder"); done
    srun+=(--container-image="$IMAGE" --container-mounts="$(IFS=,; echo "${mounts[*]}")" --container-workdir="$LEDOM_HOME")
    inside=(python)
    ;;
  *) refuse "RUNTIME=$RUNTIME is none of venv, apptainer, pyxis" ;;
esac

# A signal to this shell is passed on as SIGUSR1: srun hands that to every task, while of a SIGTERM it makes a SIGKILL.
pass_on() {
  stopped_by=SIG$1
  say "SIG$1 to the batch script${step:+, passed on to the tasks}"
  [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}

run_step() {
  local command=("${srun[@]}" examples/slurm/task.sh "${inside[@]}" "$@")
  status=0
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  [ -z "$stopped_by" ] || { status=75; end_job; } # before the step began
  "${command[@]}" &
  step=$!
  while :; do # wait comes back for every signal, too
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  step=""
}

launch() {
  run_step "$@"
  end_job
}

check_nodes() {
  [ "$PREFLIGHT" = 1 ] || return 0
  local flags
  read -r -a flags <<<"${PREFLIGHT_FLAGS:-}"
  run_step tools/preflight.py --exclude-file "$state_file.exclude" "${flags[@]}" "$@"
  if [ "$status" = 3 ]; then end_job "$(cat "$state_file.exclude")"; fi
  [ "$status" = 0 ] || end_job
}

train() {
  local blend data model layout run training device=${DEVICE:-cuda}
  require RUN_DIR DATA_PATH TOKENIZER
  read -r -a blend <<<"$DATA_PATH"
  data=(--data-path "${blend[@]}" --tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}" --tokenizer-model "$TOKENIZER")
  model=(--preset "${PRESET:-$1}" --device "$device")
  layout=(--tensor-model-parallel-size "${TP:-$2}" --pipeline-model-parallel-size "${PP:-1}")
  run=(--run-dir "$RUN_DIR" --save-interval "${SAVE_INTERVAL:-250}")
  # shellcheck disable=SC2329  # end_job calls it
  progress() { sed 's/^/step /' "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || true; }
  training=("${model[@]}" "${layout[@]}" "${data[@]}" "${run[@]}" "${@:3}")
  check_nodes --device "$device" -- "${training[@]}"
  launch tools/pretrain.py "${training[@]}"
}

if [ "${DRY_RUN:-0}" != 1 ]; then
  trap 'pass_on USR1' USR1
  trap 'pass_on TERM' TERM
fi
