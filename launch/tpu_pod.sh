#!/usr/bin/env bash
# A Cloud TPU pod slice: run where gcloud is, starts one process on each host.
#   TPU=my-slice ZONE=us-west4-a DATA=gs://my-bucket/data \
#     WORKDIR=gs://my-bucket/runs/first launch/tpu_pod.sh [FLAG ...]
# On every host the checkout lies in REPO; PYTHON may be relative to it. What the
# hosts print comes through this connection: start it in tmux, or the like.
set -euo pipefail

: "${TPU:?the name of the slice}"
: "${ZONE:?its zone}"
: "${DATA:?the datasets: gs://BUCKET/PATH, or a folder on each host}"
: "${WORKDIR:?gs://BUCKET/PATH, or a folder that all hosts share}"
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
