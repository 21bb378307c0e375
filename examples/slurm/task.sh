#!/usr/bin/env bash
# One task of a step: Slurm's own variables become those that torch and Megatron read, then the command takes its place.
#
#   srun ... examples/slurm/task.sh python tools/pretrain.py ...
#
# {task} in an argument becomes the task's number. With DONE_FILE set, a task whose file exists has nothing to do.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
if [ -n "${DONE_FILE:-}" ] && [ -e "${DONE_FILE//\{task\}/$SLURM_PROCID}" ]; then exit 0; fi
exec "${@//\{task\}/$SLURM_PROCID}"
