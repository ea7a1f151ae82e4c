#!/usr/bin/env bash
# What a GPU is for, in parts of at most about ten minutes: benchmarks/gpu.sh check | xl | xxl | real | ladder
#
#   PYTHON=...   the environment (default: .venv/bin/python): make install EXTRAS=dev,cuda13, and torch and peft for the peer
#   WHEELS=...   a folder of packages to add first, on a machine that reaches no index
#   OUT=...      where results go (default: benchmarks/results)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
out="${OUT:-benchmarks/results}"
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi

speed() {
  "$python" benchmarks/accelerator.py --results "$out/accelerator.jsonl" "$@"
}

case "${1:?expected check, xl, xxl, real or ladder}" in
  check) JAX_PLATFORMS=cuda "$python" -m pytest -m gpu ;;
  xl | xxl) speed --sizes "$1" --sample 0 ;; # every attention, remat and int8, beside PEFT
  real) speed --sizes xxl --variants ours:flash,peft:sdpa,peft:compile --rounds 3 ;;
  ladder) "$python" configs/pretrain/ladder/make.py --sizes 40m --longer 40 --curves "$out/ladder" batch_size=128 ;;
  *) echo "$1: expected check, xl, xxl, real or ladder" >&2 && exit 2 ;;
esac
