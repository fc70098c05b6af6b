#!/usr/bin/env bash
# GKE with xpk: run where xpk is, starts one process on each host of a slice.
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-16 \
#     IMAGE=us-docker.pkg.dev/my-project/images/jaxprog:tpu \
#     DATA=gs://my-bucket/data WORKDIR=gs://my-bucket/runs/first \
#     launch/gke_xpk.sh [FLAG ...]
set -euo pipefail

: "${CLUSTER:?the name of the cluster}"
: "${TPU_TYPE:?such as v5litepod-16}"
: "${IMAGE:?the image that the Dockerfile makes with EXTRA=tpu}"
: "${DATA:?the datasets: gs://BUCKET/PATH}"
: "${WORKDIR:?gs://BUCKET/PATH}"
XPK=${XPK:-xpk}
NAME=${NAME:-jaxprog}

variables=$(printf '%q ' "DATA=$DATA" "WORKDIR=$WORKDIR" \
  "CONFIG=${CONFIG:-progressive}" "PLATFORM=${PLATFORM:-tpu}" \
  "PYTHON=${PYTHON:-python3}")
arguments=''
if (($#)); then
  arguments=$(printf ' %q' "$@")
fi
# The pods know each other by TPU_WORKER_HOSTNAMES, which GKE sets. A run that a
# signal ended (143) is started again, and so are those that lost it (1); not
# after a mistake (2). exec: what xpk puts around the command passes signals on
# to one process, which must be the run.
exec "$XPK" workload create --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}" \
  --max-restarts="${RESTARTS:-20}" --restart-on-exit-codes=1 \
  --termination-grace-period-seconds="${GRACE:-120}" \
  --docker-image="$IMAGE" \
  --command="exec env ${variables}launch/tpu_vm.sh$arguments"
