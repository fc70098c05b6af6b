#!/usr/bin/env bash
# One Cloud TPU VM (v5e-1 to v5e-8, v6e-8): run on the VM itself.
#   DATA=gs://my-bucket/data WORKDIR=gs://my-bucket/runs/first \
#     launch/tpu_vm.sh [FLAG ...]
set -euo pipefail

: "${DATA:?the datasets: gs://BUCKET/PATH, or a folder}"
: "${WORKDIR:?gs://BUCKET/PATH, or a folder that outlives the VM}"
CONFIG=${CONFIG:-progressive}
PYTHON=${PYTHON:-python3}

cd "$(dirname "$0")/.."
exec "$PYTHON" -m jaxprog --config="$CONFIG" --workdir="$WORKDIR" \
  --config.data_dir="$DATA" --config.platform="${PLATFORM:-tpu}" "$@"
