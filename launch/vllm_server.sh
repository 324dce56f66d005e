#!/usr/bin/env bash
# A vLLM server for `rollouts: {engine: vllm, mode: server}`.
#
#   launch/vllm_server.sh MODEL [--port 8000] [further options of `vllm serve`]
#
# Only this machine can reach it, and only who has its key: one is made in a file for this user, where the trainer finds it. To
# bind another address, set POSTTRAIN_VLLM_HOST and a key: POSTTRAIN_VLLM_HOST=0.0.0.0 POSTTRAIN_VLLM_API_KEY=... launch/vllm_server.sh
# MODEL; the recipe names the trainer's variable with the same key in rollouts.vllm.api_key_env. Traffic is not encrypted: keep it
# inside a private network or a tunnel. POSTTRAIN_VLLM_TRANSFER_DIR is the recipe's rollouts.vllm.transfer_dir, if it is not /dev/shm;
# POSTTRAIN_VLLM_NAMES has further names by which clients call the server. PYTHON chooses the interpreter.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
model=$1
shift
python=${PYTHON:-python3}
export PYTHONSAFEPATH=1 # no modules from the working folder, which may be anybody's
host=${POSTTRAIN_VLLM_HOST:-127.0.0.1}
port=8000
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --port) port=$2; shift 2 ;;
    --port=*) port=${1#*=}; shift ;;
    --host | --host=*) echo "vllm_server: give the address as POSTTRAIN_VLLM_HOST=..., see the head of this script" >&2; exit 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done

case $host in
  127.* | localhost | ::1) ;;
  *)
    if [[ -z ${POSTTRAIN_VLLM_API_KEY:-} ]]; then
      echo "vllm_server: $host is not this machine alone; set POSTTRAIN_VLLM_API_KEY to a key" >&2
      exit 2
    fi
    ;;
esac
if ! "$python" - "$host" "$port" <<'PY'; then
import socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((sys.argv[1], int(sys.argv[2])))
    except OSError as error:
        sys.exit(f"vllm_server: port {sys.argv[2]} on {sys.argv[1]} is taken ({error.strerror}); take another --port")
PY
  exit 3
fi

if [[ -z ${POSTTRAIN_VLLM_API_KEY:-} ]]; then
  POSTTRAIN_VLLM_API_KEY=$("$python" -m posttrain.rollouts.vllm_key "$port")
fi
export POSTTRAIN_VLLM_API_KEY POSTTRAIN_VLLM_HOST=$host
# The weight sync needs vLLM's development interface, which would take any command: vllm_guard lets only the sync's through.
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1
given() { [[ " ${arguments[*]} " == *" $1"[\ =]* ]]; }
if [[ $("$python" -c 'import torch; print(torch.cuda.is_available())') == False ]]; then
  # On a CPU compiling takes minutes, and the cache would take most of the memory.
  given --enforce-eager || given --no-enforce-eager || arguments+=(--enforce-eager)
  # A prompt read in parts would wind a seeded generator back, which torch does for those on GPUs alone.
  given --enable-chunked-prefill || given --no-enable-chunked-prefill || arguments+=(--no-enable-chunked-prefill)
  given --kv-cache-memory-bytes || arguments+=(--kv-cache-memory-bytes "${KV_CACHE_BYTES:-1073741824}")
fi
# An adapter sync names a new adapter after every update (rollouts.vllm.sync: adapter).
given --enable-lora && export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
given --logprobs-mode || arguments+=(--logprobs-mode processed_logprobs)

# Not exec: if the server is killed, its workers would go on. They are in its process group, and end with it here.
set -m
"$python" -W ignore::DeprecationWarning -m vllm.entrypoints.openai.api_server \
  --model "$model" --host "$host" --port "$port" --generation-config vllm --max-logprobs -1 \
  --worker-extension-cls posttrain.rollouts.vllm_worker.SyncExtension \
  --middleware posttrain.rollouts.vllm_guard.Guard "${arguments[@]}" &
server=$!
# Files of shared memory that the server's processes have mapped: one that is killed leaves them behind.
segments() {
  local stat line
  for stat in /proc/[0-9]*/stat; do
    read -r line 2>/dev/null <"$stat" || continue
    # shellcheck disable=SC2086 # after the name in brackets: state, parent, process group
    set -- ${line##*) }
    [[ $3 == "$server" ]] || continue
    sed -n 's|^.* \(/dev/shm/[^/ ]*\)$|\1|p' "${stat%stat}maps" 2>/dev/null || true
  done
}
mapped=
trap 'mapped+=$(segments)$'"'\n'"'; kill -TERM "$server" 2>/dev/null || true' INT TERM HUP
status=0
wait "$server" || status=$?
while kill -0 "$server" 2>/dev/null; do # a signal ends `wait` before the server has ended
  wait "$server" || status=$?
done
mapped+=$(segments)
kill -KILL -- "-$server" 2>/dev/null || true
for _ in {1..50}; do # until all of them have let go
  [[ -z $(segments) ]] && break
  sleep 0.1
done
for segment in $(sort -u <<<"$mapped"); do
  grep -qsF " $segment" /proc/[0-9]*/maps || rm -f -- "$segment" # another process may have joined it
done
exit "$status"
