#!/usr/bin/env bash
# A run on two DGX Sparks: Ray's head on this one, a worker on the other, over the link between their ConnectX-7 ports.
#
#   launch/spark_pair/run.sh nvidia@192.168.100.11 +recipe=grpo_qwen model=hub model.path=Qwen/Qwen3-4B
#
# The first argument is how ssh reaches the other Spark, by its address on the fast link; the rest goes to
# rlsys.launch. Both have the checkout at the same path. One trains and the other samples (cluster=gb10_pair): a model's
# layers are not spread over the link.
#
# In the environment:
#   RLSYS_BIN       folder of python and ray, on both   [.venv/bin of the checkout]
#   RLSYS_PORT      of Ray on this Spark                [6379]
#   RLSYS_CLUSTER   where the run takes place           [cluster=gb10_pair]
#   RLSYS_ANY_LINK  1: also over a link of less than 100 Gb/s
#   RLSYS_START_S   seconds that the other may take     [120]
#   RLSYS_TEMP      folder of each Spark's own, short   [/tmp]
set -euo pipefail

(($# > 0)) || { sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2; exit 2; }
other=$1
shift
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${RLSYS_BIN:-$home/.venv/bin}
port=${RLSYS_PORT:-6379}
start_s=${RLSYS_START_S:-120}
other_address=$(getent ahostsv4 "${other#*@}" | awk '{ print $1; exit }')
[[ -n $other_address ]] || { echo "'${other#*@}' has no address: give the other Spark's on the fast link" >&2; exit 2; }

route=$(ip -4 route get "$other_address") # ADDRESS dev INTERFACE src OWN …
interface=$(awk '{ for (i = 1; i < NF; i++) if ($i == "dev") { print $(i + 1); exit } }' <<< "$route")
address=$(awk '{ for (i = 1; i < NF; i++) if ($i == "src") { print $(i + 1); exit } }' <<< "$route")
speed=$(cat "/sys/class/net/$interface/speed" 2>/dev/null || echo 0)
if ((speed < 100000)) && [[ ${RLSYS_ANY_LINK:-0} != 1 ]]; then
  echo "$other_address is reached by $interface, a link of $speed Mb/s: give the other Spark's address on the 200 Gb/s" \
    "link (ibdev2netdev names its interface), or set RLSYS_ANY_LINK=1" >&2
  exit 2
fi

there() { # runs a script from standard input on the other Spark
  # shellcheck disable=SC2029 # words are quoted here for the shell there
  ssh -o BatchMode=yes "$other" "bash -s -- ${*@Q}"
}

state=$(umask 077 && mktemp -d "${RLSYS_TEMP:-/tmp}/rlsys-pair.XXXXXX")
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$state/token"
# shellcheck disable=SC2016,SC2329 # a trap calls it, and $1 is for the other host
end() {
  trap - EXIT
  # The worker first: it asks the head to let it go. Then what Ray did not end; no other command line has this folder.
  there "$state" <<< 'pid=$(cat "$1/ray.pid") && kill "$pid" && for i in {1..40}; do kill -0 "$pid" || break; sleep 1; done
    pkill -KILL -f -- "$1/ray" ; rm -rf "$1"' 2>/dev/null || true
  if [[ -n ${ray:-} ]] && kill "$ray" 2>/dev/null; then
    wait "$ray" 2>/dev/null || true
  fi
  pkill -KILL -f -- "$state/ray" || true
  rm -rf "$state"
}
trap end EXIT
# shellcheck disable=SC2329 # traps call it
stop() { # the run writes its last checkpoint, for which the other Spark is still needed
  [[ -n ${run:-} ]] || exit "$1"
  kill -TERM "$run" 2> /dev/null || true
}
trap 'stop 130' INT
trap 'stop 143' TERM

# One memory for CPU and GPU: Ray's monitor would take the GPU's part of it for a process that eats memory.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token RAY_memory_monitor_refresh_ms=0
export NCCL_SOCKET_IFNAME="=$interface" GLOO_SOCKET_IFNAME=$interface
export PATH=$bin:$PATH
cd "$home"

ray start --head --block --disable-usage-stats --port="$port" --node-ip-address="$address" --temp-dir="$state/ray" \
  --include-dashboard=false > "$state/ray.log" 2>&1 &
ray=$!
python launch/wait_for_nodes.py "$address:$port" 1 "$start_s" || { tail -n 20 "$state/ray.log" >&2; exit 1; }

# The token goes by standard input: an argument could be read in the list of processes.
{
  printf 'token=%s\n' "$(<"$state/token")"
  cat << 'WORKER'
set -euo pipefail
umask 077
mkdir -p "$1" && printf %s "$token" > "$1/token"
interface=$(ip -4 route get "${2%:*}" | awk '{ for (i = 1; i < NF; i++) if ($i == "dev") { print $(i + 1); exit } }')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$1/token RAY_memory_monitor_refresh_ms=0
export NCCL_SOCKET_IFNAME="=$interface" GLOO_SOCKET_IFNAME=$interface
export PATH=$4:$PATH
cd "$5"
nohup ray start --block --disable-usage-stats --address="$2" --node-ip-address="$3" --temp-dir="$1/ray" \
  < /dev/null > "$1/ray.log" 2>&1 &
echo $! > "$1/ray.pid"
WORKER
} | there "$state" "$address:$port" "$other_address" "$bin" "$home"
if ! python launch/wait_for_nodes.py "$address:$port" 2 "$start_s"; then
  # shellcheck disable=SC2016 # for the other host
  there "$state" <<< 'tail -n 20 "$1/ray.log"' >&2
  exit 1
fi

python -m rlsys.launch "${RLSYS_CLUSTER:-cluster=gb10_pair}" "cluster.address='$address:$port'" "$@" &
run=$!
status=0
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do # the wait was interrupted: the run writes its last checkpoint
  status=0
  wait "$run" || status=$?
done
exit "$status"
