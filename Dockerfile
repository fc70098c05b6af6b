# The program, and JAX for one kind of hardware; docs/cloud.md runs it.
#   docker build --build-arg EXTRA=cuda --tag jaxprog:cuda .
FROM python:3.12-slim

# cpu, cuda or tpu.
ARG EXTRA=cpu

WORKDIR /jaxprog
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
  case "$EXTRA" in \
    cpu) extras=gcs,s3,tune ;; \
    cuda | tpu) extras="gcs,s3,tune,$EXTRA" ;; \
    *) echo "EXTRA is cpu, cuda or tpu, not $EXTRA." >&2; exit 2 ;; \
  esac \
  && pip install --editable ".[$extras]" \
  && useradd --uid 1000 --create-home jaxprog \
  && mkdir --parents /home/jaxprog/.cache/jaxprog \
  && chown --recursive 1000:1000 /home/jaxprog \
  && chown 1000:1000 .

USER 1000
# Copies of buckets, and compiled steps.
VOLUME /home/jaxprog/.cache/jaxprog
# As a list: signals reach the run, and its exit code is the container's.
ENTRYPOINT ["jaxprog"]
