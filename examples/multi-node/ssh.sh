#!/usr/bin/env bash
# Trains on hosts that ssh reaches without a password. Run it on any machine that sees the shared directory:
#
#   HOSTS="gpu01 gpu02" bash examples/multi-node/ssh.sh FILE.yaml [key=value ...]
#
# HOSTS        the hosts; the first one is the master. One host needs no script: `erniekit train FILE.yaml`.
# MASTER_PORT  a free port on the first host (8080)
# ERNIEKIT     the command on the hosts, if it is not on their PATH: ERNIEKIT=/path/to/.venv/bin/erniekit
#
# The job's token lies in a file in the current directory that only you can read, as long as this script runs.
# The current directory must be the same one on all hosts (code, YAML, data, output_dir on a shared file system).
# Ctrl-C closes the connections, by which the job gets SIGHUP: it finishes its step, saves a checkpoint and ends.
set -euo pipefail

read -ra hosts <<< "${HOSTS:?set it to the names of the hosts, the first is the master}"
here=$(printf '%q' "$PWD")
token=$PWD/.erniekit-token-$$
trap 'rm -f "$token"' EXIT
(umask 077; head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' > "$token")
pids=()
trap 'kill "${pids[@]}" 2> /dev/null || true' INT TERM
for node in "${!hosts[@]}"; do
  words=(env "NNODES=${#hosts[@]}" "MASTER_ADDR=${hosts[0]}" "MASTER_PORT=${MASTER_PORT:-8080}"
    "PADDLE_NODE_RANK=$node" "ERNIEKIT_JOB_TOKEN_FILE=$token" "${ERNIEKIT:-erniekit}" train "$@")
  # -tt: what runs there ends when this connection does.
  ssh -tt "${hosts[$node]}" "cd $here && exec $(printf '%q ' "${words[@]}")" < /dev/null &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
