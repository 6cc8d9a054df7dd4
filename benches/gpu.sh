#!/usr/bin/env bash
# What a machine with a GPU can show, stage by stage; a stage is benches/gpu_STAGE.py and writes STAGE.json.
#   benches/gpu.sh [--only STAGE] [--out FOLDER] [-- ARGUMENTS OF THE STAGE]
# A stage ends with 0 (done), 3 (skipped: it said in one line what is missing) or anything else (failed). Nothing is fetched.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STAGES=(export)
OUT="out/gpu"
while [ $# -gt 0 ]; do
  case "$1" in
    --only) [[ " ${STAGES[*]} " == *" ${2:-} "* ]] || { echo "gpu.sh: --only is ${STAGES[*]}; given '${2:-}'" >&2; exit 2; }
            STAGES=("$2"); shift 2 ;;
    --out) OUT="${2:?gpu.sh: --out takes a folder}"; shift 2 ;;
    --) shift; break ;;
    *) echo "gpu.sh: unknown argument '$1'; see the head of this file" >&2; exit 2 ;;
  esac
done
mkdir -p "$OUT"
failed=0
for stage in "${STAGES[@]}"; do
  PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" "benches/gpu_$stage.py" --out "$OUT/$stage.json" "$@"
  case $? in
    0) echo "gpu.sh: $stage done -> $OUT/$stage.json" ;;
    3) echo "gpu.sh: $stage SKIPPED" ;;
    *) echo "gpu.sh: $stage FAILED" >&2; failed=1 ;;
  esac
done
exit "$failed"
