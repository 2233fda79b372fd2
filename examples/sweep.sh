#!/usr/bin/env bash
# A sweep over the concurrency that can be stopped and started again: a point whose CSV is there is skipped.
# Ctrl-C ends it. `--concurrency 1,2,4,8` does the same in one process, with a table at the end.
# Usage: examples/sweep.sh MODEL [API_BASE] [OUTPUT_DIRECTORY]; more options by OPTIONS="--stream --output-tokens 256",
# other levels by LEVELS="1 2 3"
set -euo pipefail
model=${1:?usage: examples/sweep.sh MODEL [API_BASE] [OUTPUT_DIRECTORY]}
base=${2:-http://127.0.0.1:8000/v1}
out=${3:-sweep}
script=$(dirname "$0")/../online_bench_openai_async.py
mkdir -p "$out"

for n in ${LEVELS:-1 2 4 8 16 32 64 128 256}; do
    csv=$out/concurrency-$n.csv
    [ -e "$csv" ] && { echo "concurrency $n: done before" >&2; continue; }
    # Written under another name until the point is complete, so that a stopped one is made again.
    # shellcheck disable=SC2086
    python3 "$script" --api-base "$base" --model "$model" --concurrency "$n" --total-requests $((n * 8)) \
        --results-csv "$csv.part" --overwrite --summary-jsonl "$out/summary.jsonl" ${OPTIONS:-} > "$out/concurrency-$n.txt"
    mv "$csv.part" "$csv"
    head -n 7 "$out/concurrency-$n.txt"
done
