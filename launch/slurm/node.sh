#!/usr/bin/env bash
# One node of the allocation, started by rlsys.sbatch on each. Node 0 is Ray's head and runs the recipe; the others are
# its workers until it says that the run has ended.
set -euo pipefail

shared=${RLSYS_SHARED:?started by rlsys.sbatch}
bin=${RLSYS_BIN:-$RLSYS_HOME/.venv/bin}
start_s=${RLSYS_START_S:-300}
# Two jobs on one node must not meet: every port that Ray does not choose by itself follows from the job's number.
port=$((20000 + SLURM_JOB_ID % 4000 * 4))
temp=${RLSYS_TEMP:-/tmp}/rlsys-$SLURM_JOB_ID # short: Ray puts sockets into it, whose paths may have 107 characters

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$shared/token
export PATH=$bin:$PATH
cd "$RLSYS_HOME"

first_address() { # of an interface, or of the host
  if [[ -n ${RLSYS_INTERFACE:-} ]]; then
    ip -4 -oneline address show dev "$RLSYS_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }'
  else
    ip -4 -oneline address show scope global up | awk '{ sub("/.*", "", $4); print $4; exit }'
  fi
}

address_towards() { # this host's, on the way to another
  ip -4 route get "$1" | awk '{ for (i = 1; i < NF; i++) if ($i == "src") { print $(i + 1); exit } }'
}

start_ray() { # in the background; its process is $ray
  ray start --block --disable-usage-stats --temp-dir="$temp" --node-ip-address="$address" \
    --dashboard-agent-listen-port=$((port + 2)) "$@" > "$shared/ray-$SLURM_PROCID.log" 2>&1 &
  ray=$!
}

# shellcheck disable=SC2329 # a trap calls it
end() {
  if [[ -n ${ray:-} ]] && kill "$ray" 2>/dev/null; then
    wait "$ray" 2>/dev/null || true
  fi
  pkill -KILL -f -- "$temp/" || true # what Ray did not end; nobody else's command line has this folder
  rm -rf "$temp"
  touch "$shared/left-$SLURM_PROCID"
}

# shellcheck disable=SC2329 # a trap calls it
end_all() { # workers first: they ask the head to let them go
  local waited
  touch "$shared/ended"
  for ((waited = 0; waited < 40; waited++)); do
    (($(find "$shared" -name 'left-*' | wc -l) >= SLURM_NNODES - 1)) && break
    sleep 1
  done
  end
}
trap end EXIT

if ((SLURM_PROCID > 0)); then
  for ((waited = 0; waited < start_s; waited++)); do
    [[ -s $shared/address ]] && break
    sleep 1
  done
  [[ -s $shared/address ]] || { echo "node $SLURM_PROCID: no head within $start_s s" >&2; exit 1; }
  address=$(address_towards "$(<"$shared/address")")
  start_ray --address="$(<"$shared/address"):$port"
  while [[ ! -e $shared/ended ]]; do
    kill -0 "$ray" 2>/dev/null || {
      echo "node $SLURM_PROCID ($address): Ray has ended" >&2
      tail -n 20 "$shared/ray-$SLURM_PROCID.log" >&2
      exit 1
    }
    sleep 1
  done
  exit 0
fi

trap end_all EXIT
address=$(first_address)
[[ -n $address ]] || { echo "node 0 has no address on ${RLSYS_INTERFACE:-any interface}" >&2; exit 1; }
start_ray --head --port="$port" --ray-client-server-port=$((port + 1)) --include-dashboard=false
python launch/wait_for_nodes.py "$address:$port" 1 "$start_s" || { tail -n 20 "$shared/ray-0.log" >&2; exit 1; }
echo "$address" > "$shared/address.new"
mv "$shared/address.new" "$shared/address" # whole, or not there
python launch/wait_for_nodes.py "$address:$port" "$SLURM_NNODES" "$start_s" || exit 1

python -m rlsys.launch cluster=ray "cluster.address='$address:$port'" "$@" &
run=$!
while kill -0 "$run" 2>/dev/null; do
  if [[ -e $shared/stop ]]; then
    kill -TERM "$run"
    break
  fi
  sleep 1
done
status=0
wait "$run" || status=$?
echo "$status" > "$shared/status"
exit "$status"
