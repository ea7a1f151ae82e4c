#!/usr/bin/env bash
# From no TPU to a finished run: Cloud TPU VMs through queued resources.
#
#   tpu/tpu.sh [--dry-run] [--settings FILE] COMMAND
#
#   all       create, install, run, watch, delete
#   create    ask for the TPU and wait until it is there
#   install   copy this folder's checkout to every worker and install it there
#   run       start the run on every worker; it goes on when the connection is lost
#   watch     wait until the run has finished; when the TPU is taken away, get another and go on
#   logs      follow the first worker's output
#   status    say how the TPU and the run are
#   stop      let the run save and end; `run` goes on from there
#   delete    give the TPU back: what costs money ends here
#
# --dry-run prints every command and runs none.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
set -- ${arguments[@]+"${arguments[@]}"}

here='cd softprompt && bash tpu/worker.sh'
tries=10

tpus() { run gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE"; }

# On one worker, or on all: on all COMMAND
on() { tpus tpu-vm ssh "$NAME" "--worker=$1" --quiet "--command=$2"; }

# What the TPU does: ABSENT, LOST, or the state of the queued resource; a dry run goes on with $1.
state() {
  local errors found node
  if [ "$dry_run" = yes ]; then
    tpus queued-resources describe "$NAME" '--format=value(state.state)'
    echo "$1"
    return
  fi
  errors="$(mktemp)"
  if ! found="$(tpus queued-resources describe "$NAME" '--format=value(state.state)' 2>"$errors")"; then
    if grep -q NOT_FOUND "$errors"; then found=ABSENT; else found=UNKNOWN && grep -v '^+' "$errors" >&2; fi
  elif [ "$found" = ACTIVE ]; then # the queue learns of a preemption later than the machine
    node="$(tpus tpu-vm describe "$NAME" '--format=value(state)' 2>"$errors" || true)"
    case "$node" in PREEMPTED | TERMINATED) found=LOST ;; esac
  fi
  rm -f "$errors"
  echo "${found:-UNKNOWN}"
}

create() {
  local options=("--node-id=$NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME")
  [ "$SPOT" != yes ] || options+=(--spot)
  [ -z "$QUEUE_FOR" ] || options+=("--valid-until-duration=$QUEUE_FOR")
  local now
  now="$(state ABSENT)"
  case "$now" in
    SUSPENDED | SUSPENDING | FAILED | LOST) # of an earlier request, which keeps the name
      delete
      now=ABSENT
      ;;
  esac
  if [ "$now" = ABSENT ]; then
    tpus queued-resources create "$NAME" "${options[@]}" ||
      refuse "$ACCELERATOR in $ZONE was refused (see above); expected quota for it and a zone that has it;" \
        "look at https://console.cloud.google.com/iam-admin/quotas"
  else
    say "$NAME exists already ($now)"
  fi
  while true; do
    now="$(state ACTIVE)"
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | LOST | ABSENT)
        tpus queued-resources describe "$NAME" '--format=yaml(state)' || true
        refuse "$NAME: $now; expected a TPU; ask again later, or in another ZONE"
        ;;
    esac
    say "$now: waiting for $ACCELERATOR in $ZONE"
    pause
  done
}

# A new machine refuses connections for a while.
patiently() {
  local try
  for ((try = 1; try < tries; try++)); do
    ! "$@" || return 0
    say "try $try of $tries failed"
    pause
  done
  "$@"
}

install() {
  local bundle
  bundle="${TMPDIR:-/tmp}/$NAME.tar.gz"
  # Committed or not, but nothing that git ignores (environments, runs) and nothing that was deleted.
  run bash -c "cd $(quoted "$root") && git ls-files -z --cached --others --exclude-standard | \
    while IFS= read -r -d '' file; do [ ! -f \"\$file\" ] || printf '%s\\0' \"\$file\"; done | \
    tar --null -T - -czf $(quoted "$bundle")"
  patiently tpus tpu-vm scp "$bundle" "$NAME:softprompt.tar.gz" --worker=all --quiet
  patiently on all "mkdir -p softprompt && tar -xzf softprompt.tar.gz -C softprompt && $here install"
}

start() { patiently on all "$here start $(quoted .venv/bin/softprompt "${command[@]}")"; }

# The run's exit code, "running", or "unreachable".
outcome() {
  local found
  if [ "$dry_run" = yes ]; then
    on 0 "$here outcome"
    echo 0
  else
    # What a connection printed before it broke says nothing.
    found="$(on 0 "$here outcome" 2>/dev/null)" || found=unreachable
    echo "${found:-unreachable}"
  fi
}

watch() {
  local now code
  while true; do
    now="$(state ACTIVE)"
    case "$now" in
      ACTIVE)
        code="$(outcome)"
        case "$code" in
          0) say "finished: $OUT" && return ;;
          running | unreachable) ;;
          absent) start ;; # a new machine, or `run` was never reached
          *)
            on 0 "$here tail" || true
            say "ended with exit code $code: see above; the TPU still costs money until \`delete\`"
            exit 1
            ;;
        esac
        ;;
      SUSPENDED | FAILED | LOST | ABSENT)
        say "$now: the TPU was taken away; another one goes on from the last checkpoint"
        create
        install
        start
        ;;
    esac
    pause
  done
}

delete() { tpus queued-resources delete "$NAME" --force --quiet; }

program gcloud "see https://cloud.google.com/sdk/docs/install"
need PROJECT "a Google Cloud project" ZONE "a zone" ACCELERATOR "an accelerator type" RUNTIME "a runtime version"
if [ "$SPOT" = yes ] && [[ "$OUT" != gs://* ]]; then
  refuse "$settings: OUT is $OUT and SPOT is yes; expected gs://BUCKET/FOLDER; a spot TPU takes its disk with it"
fi
case "${1-}" in
  all)
    create
    install
    start
    watch
    delete
    ;;
  create | install | watch | delete) "$1" ;;
  run) start ;;
  logs) patiently on 0 "$here follow" ;;
  status)
    say "TPU: $(state ACTIVE)"
    say "run: $(outcome)"
    ;;
  stop) on all "$here stop" ;;
  *) refuse "found ${1:-no command}; expected all, create, install, run, watch, logs, status, stop or delete; see its first lines" ;;
esac
