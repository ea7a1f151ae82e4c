#!/usr/bin/env bash
# On a worker of a TPU: keeps a run going until it is finished, whatever happens to the connection that started it.
#
#   worker.sh install | start COMMAND... | outcome | tail | follow | stop
#
# A command that ends with 75 (told to go, saved) is started again, and after other failures five times; 2 is bad input.
set -euo pipefail

folder="${SOFTPROMPT_WORKER:-$HOME/softprompt-run}" # log, exit code, lock
wait_s="${WAIT_S:-10}"
start_s="${START_S:-60}"
failures_allowed=5
metadata=http://metadata.google.internal/computeMetadata/v1/instance
mkdir -p "$folder"

# Has the machine been told that it will be taken away or stopped for maintenance?
noticed() {
  local told
  for told in preempted maintenance-event; do
    case "$(curl -sf -m 5 -H 'Metadata-Flavor: Google' "$metadata/$told" || true)" in
      TRUE | TERMINATE_ON_HOST_MAINTENANCE) return 0 ;;
    esac
  done
  return 1
}

keep() {
  local child="" code failures=0 stopping=no
  exec 9>"$folder/lock"
  flock -w 5 9 || return 0 # not at once: `running` holds it for a moment
  echo $$ >"$folder/pid"
  rm -f "$folder/exit_code"
  trap 'stopping=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  while true; do
    "$@" 9>&- &
    child=$!
    (
      exec 9>&-
      while kill -0 "$child" 2>/dev/null; do
        ! noticed || kill -TERM "$child" 2>/dev/null || true
        sleep "$wait_s"
      done
    ) &
    while true; do # `wait` returns early when this script is told to stop
      code=0
      wait "$child" || code=$?
      kill -0 "$child" 2>/dev/null || break
    done
    echo "$(date -u +%FT%TZ) ended with exit code $code"
    case "$code" in
      0 | 2) break ;;
      75) failures=0 ;;
      *) failures=$((failures + 1)) ;;
    esac
    [ "$stopping" = no ] && [ "$failures" -le "$failures_allowed" ] || break
    sleep "$wait_s"
    while noticed; do sleep "$wait_s"; done
  done
  echo "$code" >"$folder/exit_code"
}

running() { ! flock -n "$folder/lock" true; }

case "${1-}" in
  install)
    if ! python3.11 -c 'import ensurepip' 2>/dev/null && ! python3.12 -c 'import ensurepip' 2>/dev/null; then
      sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
      sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq python3.11 python3.11-venv make
    fi
    make install EXTRAS=tpu,cloud
    ;;
  start)
    shift
    if running; then
      echo "$(hostname): running already"
    else
      rm -f "$folder/exit_code"
      setsid nohup bash "$0" keep "$@" >>"$folder/log" 2>&1 </dev/null &
      until running || [ -f "$folder/exit_code" ]; do
        if [ "$SECONDS" -ge "$start_s" ]; then
          echo "worker.sh: nothing runs after $start_s s; expected a run that holds $folder/lock; see $folder/log" >&2
          exit 1
        fi
        sleep 0.1
      done
      echo "$(hostname): started"
    fi
    ;;
  keep)
    shift
    keep "$@"
    ;;
  outcome)
    if running; then
      echo running
    else
      cat "$folder/exit_code" 2>/dev/null || echo absent
    fi
    ;;
  tail) tail -n 50 "$folder/log" ;;
  follow)
    tail -n 50 -F "$folder/log" &
    while running; do sleep 2; done
    kill $!
    ;;
  stop) ! running || kill -TERM "$(cat "$folder/pid")" ;;
  *)
    echo "worker.sh: found ${1:-no command}; expected install, start, outcome, tail, follow or stop" >&2
    exit 2
    ;;
esac
