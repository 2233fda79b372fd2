#!/usr/bin/env bash
# A gate for CI: wait for the server, measure one level, and let the exit code decide.
# Usage: examples/ci_gate.sh MODEL [API_BASE]; limits by LIMITS="p99_ttft_ms<500 p99_tpot_ms<50", load by OPTIONS="..."
# Exit codes: 0 all limits hold; 3 one does not; 1 no server, or requests failed; 2 wrong usage.
set -euo pipefail
model=${1:?usage: examples/ci_gate.sh MODEL [API_BASE]}
base=${2:-http://127.0.0.1:8000/v1}
script=$(dirname "$0")/../online_bench_openai_async.py

slos=()
for limit in ${LIMITS:-p99_ttft_ms<500 p99_tpot_ms<50}; do
    slos+=(--slo "$limit")
done
# shellcheck disable=SC2086
python3 "$script" --api-base "$base" --model "$model" --wait-ready "${WAIT_READY:-600}" --stream \
    --max-error-rate 0.01 --no-progress "${slos[@]}" ${OPTIONS:---concurrency 32 --total-requests 700}
