#!/usr/bin/env bash
# What only a GPU can show: each stage is benches/gpu_<stage>.py, under 8 minutes, and a failing one does not hide the rest.
#
#     benches/gpu.sh [--only STAGE,...] [--records FOLDER] [-- ARGUMENTS OF THE STAGE]      # PYTHON=... picks the interpreter
#
# No network is needed. Every stage prints a table and appends to FOLDER/gpu-<device>-<date>.json (benches/results). It ends with
# 0 (done), 3 (skipped: it said in one line what is missing), 4 (incomplete: out of time) or anything else (failed).
set -uo pipefail
ALL=(check ops unet attention sampler sanitize export train)
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
stages=("${ALL[@]}")
options=()

complain() {
    echo "gpu.sh: $1" >&2
    exit 2
}

while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
        --only)
            IFS=, read -ra stages <<< "${2:-}"
            [[ ${#stages[@]} -gt 0 ]] || complain "--only takes some of ${ALL[*]}, with commas between them"
            for stage in "${stages[@]}"; do
                [[ " ${ALL[*]} " == *" $stage "* ]] || complain "--only takes some of ${ALL[*]}; given '$stage'"
            done
            ;;
        --records)
            [[ -n ${2:-} ]] || complain "--records takes a folder"
            options=(--records "$2")
            ;;
        *) complain "--only STAGE,..., --records FOLDER, or -- and a stage's own arguments; given '$1'" ;;
    esac
    shift 2
done
[[ ${1:-} == -- ]] && shift

failed=()
for stage in "${stages[@]}"; do
    echo "== $stage"
    PYTHONPATH="$HERE/..:$HERE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 \
        timeout -k 10 480 "${PYTHON:-python3}" "$HERE/gpu_$stage.py" "${options[@]}" "$@"
    case $? in
        0) ;;
        3) echo "$stage: SKIPPED" ;;
        4) echo "$stage: INCOMPLETE (out of time)" ;;
        *) failed+=("$stage") ;;
    esac
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
