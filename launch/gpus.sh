#!/usr/bin/env bash
# One box with any number of GPUs: one process sees all of them.
#   DATA=/data WORKDIR=runs/first launch/gpus.sh [FLAG ...]
# With --config.mirror=s3://my-bucket/runs/first (or gs://) the run is kept in a
# bucket too, and the same command goes on from there on another machine.
# PROCESSES=8 starts one process a GPU instead, for boxes whose cores one
# Python process cannot keep busy.
set -euo pipefail

: "${DATA:?a folder with the datasets, or gs:// or s3://BUCKET/PATH}"
: "${WORKDIR:?a folder for what the run writes, or BUCKET/PATH likewise}"
CONFIG=${CONFIG:-progressive}
PYTHON=${PYTHON:-python3}
PROCESSES=${PROCESSES:-1}
PORT=${PORT:-12355}

cd "$(dirname "$0")/.."
command=("$PYTHON" -m jaxprog --config="$CONFIG" --workdir="$WORKDIR"
  --config.data_dir="$DATA" --config.platform="${PLATFORM:-gpu}" "$@")
if ((PROCESSES == 1)); then
  exec "${command[@]}"
fi

pids=()
# A signal to this script reaches all; they agree on the step to stop at.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < PROCESSES; i++)); do
  CUDA_VISIBLE_DEVICES=$i "${command[@]}" --coordinator="localhost:$PORT" \
    --process_count="$PROCESSES" --process_id="$i" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do # A trap interrupts wait.
    wait "$pid" || true
  done
  wait "$pid" || code=$?
done
exit "$code"
