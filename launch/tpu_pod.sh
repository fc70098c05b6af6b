#!/usr/bin/env bash
# A Cloud TPU pod slice: run where gcloud is, starts one process on each host.
#   TPU=my-slice ZONE=us-west4-a DATA=/mnt/data WORKDIR=/mnt/runs/first \
#     launch/tpu_pod.sh [FLAG ...]
# The checkout lies in REPO on every host; DATA may be a local disk, WORKDIR is
# one folder for all: Filestore, or a bucket mounted with gcsfuse.
set -euo pipefail

: "${TPU:?the name of the slice}"
: "${ZONE:?its zone}"
: "${DATA:?a folder with the datasets, the same path on each host}"
: "${WORKDIR:?a folder that all hosts share}"
REPO=${REPO:-jaxprog}
GCLOUD=${GCLOUD:-gcloud}

variables=$(printf '%q ' "DATA=$DATA" "WORKDIR=$WORKDIR" \
  "CONFIG=${CONFIG:-progressive}" "PLATFORM=${PLATFORM:-tpu}" \
  "PYTHON=${PYTHON:-python3}")
arguments=''
if (($#)); then
  arguments=$(printf ' %q' "$@")
fi
# The processes find each other through the metadata server of the slice.
exec "$GCLOUD" compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd $(printf '%q' "$REPO") && ${variables}launch/tpu_vm.sh$arguments"
