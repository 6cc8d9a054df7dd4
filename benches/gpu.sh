#!/usr/bin/env bash
# What only a GPU can show: each stage is benches/gpu_<stage>.py, under 8 minutes, and a failing one does not hide the rest.
#
#     benches/gpu.sh [--only STAGE] [-- ARGUMENTS OF THE STAGE]      # PYTHON=... picks the interpreter; no network is needed
#
# Every stage prints a table and appends to benches/results/gpu-<device>-<date>.json. It ends with 0 (done), 3 (skipped: it said
# in one line what is missing) or anything else (failed).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
STAGES=(check ops unet attention sampler sanitize export train)

if [[ ${1:-} == --only ]]; then
    if [[ " ${STAGES[*]} " != *" ${2:-} "* ]]; then
        echo "gpu.sh: --only takes one of ${STAGES[*]}; given '${2:-}'" >&2
        exit 2
    fi
    STAGES=("$2")
    shift 2
fi
if [[ ${1:-} == -- ]]; then
    shift
elif [[ $# -gt 0 ]]; then
    echo "usage: benches/gpu.sh [--only $(IFS='|'; echo "${STAGES[*]}")] [-- ARGUMENTS OF THE STAGE]" >&2
    exit 2
fi

failed=()
for stage in "${STAGES[@]}"; do
    echo "== $stage"
    PYTHONPATH=".:benches${PYTHONPATH:+:$PYTHONPATH}" timeout 480 "${PYTHON:-python3}" "benches/gpu_$stage.py" "$@"
    case $? in
        0) ;;
        3) echo "$stage: SKIPPED" ;;
        *) failed+=("$stage") ;;
    esac
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
