#!/usr/bin/env bash
# `accelerate launch` with these arguments, as one task of a Slurm job; train.sbatch and train_with_vllm.sbatch start it.
#
# The scheduler's SIGUSR1 before the time limit goes to every process of the task. The ranks save a checkpoint and end; the
# launcher would just die of it and take them along. So it ignores the signal here, and gets SIGTERM in its place, which it
# hands to ranks that SIGUSR1 has not reached. It then waits for them, longer than the half minute that is its default.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}

(trap '' USR1 && exec accelerate launch "$@") &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null || true' USR1 TERM INT HUP
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` before the launcher has ended
  wait "$launcher" || status=$?
done
exit "$status"
