#!/usr/bin/env bash
# GKE with xpk: run where xpk is, starts one process on each host of a slice.
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-16 IMAGE=gcr.io/my/jaxprog \
#     DATA=/mnt/data WORKDIR=/mnt/runs/first launch/gke_xpk.sh [FLAG ...]
# DATA and WORKDIR are folders in the containers: volumes that xpk attaches,
# such as Filestore or a bucket (xpk storage attach ... --type=gcsfuse).
set -euo pipefail

: "${CLUSTER:?the name of the cluster}"
: "${TPU_TYPE:?such as v5litepod-16}"
: "${IMAGE:?a container image with this checkout as its working directory}"
: "${DATA:?a folder with the datasets}"
: "${WORKDIR:?a folder that all hosts share}"
XPK=${XPK:-xpk}
NAME=${NAME:-jaxprog}

variables=$(printf '%q ' "DATA=$DATA" "WORKDIR=$WORKDIR" \
  "CONFIG=${CONFIG:-progressive}" "PLATFORM=${PLATFORM:-tpu}" \
  "PYTHON=${PYTHON:-python3}")
arguments=''
if (($#)); then
  arguments=$(printf ' %q' "$@")
fi
# The pods know each other by TPU_WORKER_HOSTNAMES, which GKE sets.
exec "$XPK" workload create --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}" \
  --docker-image="$IMAGE" --command="${variables}launch/tpu_vm.sh$arguments"
