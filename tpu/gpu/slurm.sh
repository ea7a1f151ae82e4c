#!/usr/bin/env bash
# GPUs under Slurm: one process a GPU, found through Slurm itself; queued again when it is told to go.
#
#   tpu/gpu/slurm.sh [--dry-run] [--settings FILE] run | status | logs | stop
#
# Submits itself; OUT must be a folder that all nodes see. --dry-run prints every command and runs none.
if [ -n "${SLURM_JOB_ID-}" ] && [[ "${1-}" =~ ^(job|task)$ ]]; then
  set -uo pipefail
  part="$1" code=0 saved="runs/saved-$SLURM_JOB_ID" # in the checkout, which all nodes see
  shift
  if [ "$part" = task ]; then
    trap : TERM # Slurm tells the run itself; this waits for its end
    .venv/bin/softprompt "$@" || code=$?
    [ "$code" = 75 ] || exit "$code"
    # Told to go, and saved. As an error it would let srun kill those that still save, whose code would hide it.
    mkdir -p runs && touch "$saved" && exit 0
    exit "$code"
  fi
  rm -f "$saved"
  # No trap here: `scancel` ends this shell, and what was stopped by hand is not queued again.
  srun --kill-on-bad-exit=1 bash tpu/gpu/slurm.sh task "$@" || code=$?
  if [ -f "$saved" ] || [ "$code" = 75 ]; then
    rm -f "$saved"
    code=75
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" "$@"
set -- ${arguments[@]+"${arguments[@]}"}

submit() {
  local options=("--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" "--gpus-per-node=$GPUS_PER_NODE")
  [ -z "$PARTITION" ] || options+=("--partition=$PARTITION")
  # SIGTERM reaches the processes two minutes before the time is over; what they wrote stays in one log.
  options+=("--time=$TIME_LIMIT" --signal=TERM@120 --requeue --open-mode=append "--output=$NAME.log" "--chdir=$root")
  run sbatch "${options[@]}" "$root/tpu/gpu/slurm.sh" job "${command[@]}"
}

program sbatch "run this on a login node of the cluster"
case "${1-}" in
  run) submit ;;
  status) run squeue --me "--name=$NAME" ;;
  logs) run tail -n 50 -F "$root/$NAME.log" ;;
  stop) run scancel --me "--name=$NAME" ;;
  *) refuse "found ${1:-no command}; expected run, status, logs or stop; see its first lines" ;;
esac
