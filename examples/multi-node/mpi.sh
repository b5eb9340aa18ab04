#!/usr/bin/env bash
# Trains on the hosts of an MPI host file, with Open MPI's mpirun:
#
#   bash examples/multi-node/mpi.sh HOSTFILE FILE.yaml [key=value ...]
#
# HOSTFILE     a host a line; "slots=..." behind the name is not needed
# MASTER_PORT  a free port on the first host (8080)
# ERNIEKIT     the command on the hosts, if it is not on their PATH
#
# mpirun only starts one process a host, which starts one for each GPU; nothing is sent over MPI.
set -euo pipefail

hostfile=${1:?a file with a host a line}
shift
mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile")
# What strangers do not know; mpirun hands it on by name, so that no command line shows it.
ERNIEKIT_JOB_TOKEN=$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')
export ERNIEKIT_JOB_TOKEN
# OMPI_COMM_WORLD_RANK, which mpirun sets, tells each host its place.
exec mpirun -np "${#hosts[@]}" --hostfile "$hostfile" --map-by ppr:1:node --bind-to none \
  -x PATH -x ERNIEKIT_JOB_TOKEN -x "NNODES=${#hosts[@]}" -x "MASTER_ADDR=${hosts[0]}" -x "MASTER_PORT=${MASTER_PORT:-8080}" \
  "${ERNIEKIT:-erniekit}" train "$@"
