#!/usr/bin/env bash
# segjax on all hosts of a Cloud TPU pod slice, from a machine with gcloud:
#
#   TPU=name ZONE=us-central2-b launch/tpu_pod.sh --config=configs/x.py --workdir=/mnt/shared/runs/x [...]
#
# Every host needs the checkout in ~/segjax with pip install -e '.[tpu]', and the workdir and data on a file system that
# all hosts share (Filestore or a mounted disk; gs:// paths are not supported).
# --coordinator=auto leaves addresses and ids to jax.distributed, which asks the TPU's metadata server.
#
# Fails when
#   TPU or ZONE is unset, or gcloud is missing   it says so
#   a host does not come                         the others wait 300 s (--start_timeout), then say so and stop
#   a process of an earlier run still lives      "The TPU is already in use": end it, or restart the TPU
#   the slice is preempted                       its hosts vanish with or without SIGTERM: create the slice again (queued
#                                                resources do), run this again, and the run resumes; gcloud ends with 255
#   this connection breaks                       the run may go on; run.lock in the workdir refuses a second one. For days
#                                                of training, call it inside tmux
set -euo pipefail

die() { echo "tpu_pod.sh: $1" >&2; exit 2; }
[[ -n ${TPU:-} && -n ${ZONE:-} ]] || die "set TPU and ZONE to the slice's name and zone"
command -v gcloud > /dev/null || die "gcloud is not installed here"

printf -v arguments ' %q' "$@"
code=0
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd segjax && python -u -m segjax.main --coordinator=auto$arguments" || code=$?
if ((code == 75)); then echo "tpu_pod.sh: stopped and saved; the same command goes on" >&2; fi
exit "$code"
