#!/usr/bin/env bash
# `accelerate launch` with these arguments, as one task of a Slurm job; train.sbatch and train_with_vllm.sbatch start it.
#
# The scheduler's SIGUSR1 before the time limit goes to every process of the task. The ranks save a checkpoint and end; the
# launcher would just die of it and take them along. So it ignores the signal here, and gets SIGTERM in its place, which it
# hands to ranks that SIGUSR1 has not reached. It then waits for them, longer than the half minute that is its default.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}

# The ranks exchange pickles: they listen on the interface that leads to the first machine and on no other.
head=$(for ((i = 1; i < $#; i++)); do [[ ${!i} == --main_process_ip ]] && j=$((i + 1)) && echo "${!j}"; done || true)
if [[ -n $head ]] && command -v ip >/dev/null; then
  address=$(getent ahostsv4 "$head" | awk '{print $1; exit}')
  name=$(ip -o -4 addr show | awk -v address="$address" '{split($4, part, "/")} part[1] == address {print $2; exit}')
  [[ -n $name ]] || name=$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$name} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$name}
fi

(trap '' USR1 && exec accelerate launch "$@") &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null || true' USR1 TERM INT HUP
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` before the launcher has ended
  wait "$launcher" || status=$?
done
exit "$status"
