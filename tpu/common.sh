# shellcheck shell=bash disable=SC2034
# Read by the scripts of this folder: their options and settings, and one way to run a command.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
settings="$root/tpu/settings.sh"
dry_run=no
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=yes ;;
    --settings)
      settings="${2-}"
      [ $# -gt 1 ] && shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
set -- ${arguments[@]+"${arguments[@]}"} # bash 3.2, as on macOS, takes an empty list for an unset one
exec 3>&1 # where commands are shown while standard output is read by someone

# One line, exit code 2: where: what was found; what was expected; what to do.
refuse() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# Show a command, and run it unless this is a dry run.
run() {
  if [ "$dry_run" = yes ]; then
    printf '%s\n' "$(printf '%q ' "$@" | sed 's/ $//')" >&3
  else
    printf '+ %s\n' "$(printf '%q ' "$@" | sed 's/ $//')" >&2
    "$@"
  fi
}

pause() { [ "$dry_run" = yes ] || sleep "$POLL_S"; }

# Refuse empty settings: need PROJECT "a Google Cloud project" ZONE "..."
need() {
  while [ $# -gt 0 ]; do
    [ -n "${!1-}" ] || refuse "$settings: $1 is empty; expected $2; edit the file"
    shift 2
  done
}

# Refuse a program that is missing, with where to get it.
program() {
  [ "$dry_run" = yes ] || command -v "$1" >/dev/null || refuse "$1: not found; expected it on the PATH; $2"
}

quoted() { printf '%q ' "$@" | sed 's/ $//'; }

[ -f "$settings" ] || refuse "$settings: no such file; expected settings like those in tpu/settings.sh"
# shellcheck source=settings.sh
source "$settings"
need NAME "a name" TRAIN "what follows \`softprompt train\`" OUT "gs://BUCKET/FOLDER, or a folder that all machines see"
[[ "$NAME" =~ ^[a-z][a-z0-9-]{0,38}$ ]] || refuse "$settings: NAME is $NAME; expected a-z, 0-9 and -, 39 at most"
COMMAND="${COMMAND:-train}"
case "$COMMAND" in # what follows `softprompt`
  train) command=(train "${TRAIN[@]}" --out "$OUT") ;;
  eval) command=(eval "$OUT" ${EVAL[@]+"${EVAL[@]}"}) ;;
  predict)
    need PREDICT "--input and --output, which all machines see"
    command=(predict "$OUT" "${PREDICT[@]}")
    ;;
  *) refuse "$settings: COMMAND is $COMMAND; expected train, eval or predict" ;;
esac
