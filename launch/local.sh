#!/usr/bin/env bash
# Several processes of segjax on this host, as one run. One process drives all GPUs of a host by itself, so this is for
# hosts where one process per GPU (or per few) is faster, and for trying on CPU what a cluster will do.
#
#   PROCESSES=2 launch/local.sh --config=configs/x.py --workdir=runs/x [--config.field=value ...]
#
# PROCESSES    how many. Each gets an equal share of CUDA_VISIBLE_DEVICES, or of the GPUs that nvidia-smi lists.
# CPU_DEVICES  devices of each process on CPU instead, e.g. 4 (a test of the launch, not a way to be fast).
# PYTHON       the interpreter; python unless set.
#
# Fails when
#   the GPUs cannot be shared equally       it says so, and starts nothing
#   a process fails                         its reason stands above; the others stop within seconds (30 s at most) and
#                                           are killed after 90 s; its exit code is this script's
#   SIGTERM or Ctrl-C comes                 passed on: the run saves, stops, exits with 75; start again to go on
#   the port is taken in the meantime       the processes name it and stop; start again
set -euo pipefail

die() { echo "local.sh: $1" >&2; exit 2; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "needs bash 5.1 or newer, this is $BASH_VERSION"
processes=${PROCESSES:-}
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "set PROCESSES to their number, e.g. PROCESSES=2 launch/local.sh --config=..."
python=${PYTHON:-python}
cd "$(dirname "$0")/.."

gpus=()
if [[ -n ${CPU_DEVICES:-} ]]; then
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$CPU_DEVICES
else
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -r -a gpus <<< "$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null)
  fi
  ((${#gpus[@]} > 0)) || die "found no GPU; set CUDA_VISIBLE_DEVICES, or CPU_DEVICES for a test on CPU"
  ((${#gpus[@]} % processes == 0)) || die "${#gpus[@]} GPUs cannot be shared equally by $processes processes"
fi
share=$((${#gpus[@]} / processes))

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
start() { # The process of id $1, its lines marked with it.
  local id=$1 && shift
  if ((share > 0)); then
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:id * share:share}")
    export CUDA_VISIBLE_DEVICES
  fi
  exec "$python" -u -m segjax.main "$@" --coordinator="127.0.0.1:$port" --num_processes="$processes" \
    --process_id="$id" > >(exec sed -u "s/^/[$id] /") 2>&1
}
pids=()
for ((i = 0; i < processes; i++)); do
  start "$i" "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT

code=0 killer=''
while ((${#pids[@]} > 0)); do
  ended='' status=0
  wait -n -p ended "${pids[@]}" || status=$?
  [[ -n ${ended:-} ]] || continue # A signal interrupted the wait.
  left=()
  for pid in "${pids[@]}"; do [[ $pid == "$ended" ]] || left+=("$pid"); done
  pids=("${left[@]}")
  if ((status != 0 && code == 0)); then
    code=$status
    if ((code != 75 && ${#pids[@]} > 0)); then
      echo "local.sh: process $ended ended with $code; the others have 90 s to stop" >&2
      (sleep 90 && kill -KILL "${pids[@]}") > /dev/null 2>&1 &
      killer=$!
    fi
  fi
done
[[ -z $killer ]] || kill "$killer" 2> /dev/null || true
exit "$code"
