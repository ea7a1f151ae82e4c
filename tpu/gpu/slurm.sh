#!/usr/bin/env bash
# GPUs under Slurm: one process a GPU, found through Slurm itself; queued again when it is told to go.
#
#   tpu/gpu/slurm.sh [--dry-run] [--settings FILE] run | status | logs | stop
#
# Submits itself; OUT must be a folder that all nodes see. --dry-run prints every command and runs none.
if [ -n "${SLURM_JOB_ID-}" ] && [ "${1-}" = job ]; then
  set -uo pipefail
  shift
  code=0
  srun --kill-on-bad-exit=1 .venv/bin/softprompt train "$@" || code=$?
  if [ "$code" = 75 ]; then # told to go, and saved
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" "$@"
set -- "${arguments[@]}"

submit() {
  local options=("--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" "--gpus-per-node=$GPUS_PER_NODE")
  [ -z "$PARTITION" ] || options+=("--partition=$PARTITION")
  # SIGTERM reaches the processes two minutes before the time is over; what they wrote stays in one log.
  options+=("--time=$TIME_LIMIT" --signal=TERM@120 --requeue --open-mode=append "--output=$NAME.log" "--chdir=$root")
  run sbatch "${options[@]}" "$root/tpu/gpu/slurm.sh" job "${TRAIN[@]}" --out "$OUT"
}

program sbatch "run this on a login node of the cluster"
case "${1-}" in
  run) submit ;;
  status) run squeue --me "--name=$NAME" ;;
  logs) run tail -n 50 -F "$root/$NAME.log" ;;
  stop) run scancel --me "--name=$NAME" ;;
  *) refuse "found ${1:-no command}; expected run, status, logs or stop; see its first lines" ;;
esac
