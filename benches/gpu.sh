#!/usr/bin/env bash
# What only a GPU can show: each stage is benches/gpu_<stage>.py, under 8 minutes, and a failing one does not hide the rest.
#
#     benches/gpu.sh [--only STAGE]      # PYTHON=... picks the interpreter; needs torch, triton, numpy, safetensors; no network
#
# Every stage prints a table and appends to benches/results/gpu-<device>-<date>.json.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
STAGES=(check ops)

if [[ $# -gt 0 ]]; then
    if [[ $# -ne 2 || $1 != --only || " ${STAGES[*]} " != *" $2 "* ]]; then
        echo "usage: benches/gpu.sh [--only $(IFS='|'; echo "${STAGES[*]}")]" >&2
        exit 2
    fi
    STAGES=("$2")
fi

failed=()
for stage in "${STAGES[@]}"; do
    echo "== $stage"
    PYTHONPATH=".:benches${PYTHONPATH:+:$PYTHONPATH}" timeout 480 "${PYTHON:-python3}" "benches/gpu_$stage.py" || failed+=("$stage")
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
