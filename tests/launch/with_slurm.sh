#!/bin/bash
# A Slurm of one node for as long as a command runs: tests/launch/with_slurm.sh COMMAND ...
# Needs Debian's slurm-wlm and munge (apt-get install slurm-wlm munge) and no rights: any user, its own ports, all files in a temporary folder.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || { echo "no $program: apt-get install slurm-wlm munge" >&2; exit 2; }
done
folder=$(mktemp -d /tmp/slurm.XXXXXX)
started=()
finish() {
    code=$?
    trap - EXIT INT TERM
    scancel --me 2>/dev/null
    for pid in $(printf '%s\n' "${started[@]}" | tac); do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; done
    [ "$code" -eq 0 ] || tail -n 20 "$folder"/*.log >&2
    rm -rf "$folder"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

read -r controller node < <(python3 -c '
import socket
both = [socket.socket() for _ in range(2)]
for each in both: each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in both))')
host=$(hostname -s)
mkdir "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A job that is queued again may start after this many seconds; Slurm's own value is 120.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
SlurmctldPort=$controller
SlurmdPort=$node
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=300
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --seed-file="$folder/munge.seed" --log-file="$folder/munged.log" >"$folder/munged.out" 2>&1 &
started+=($!)
until [ -S "$folder/munge.socket" ]; do kill -0 "$!" || exit 1; sleep 0.1; done
slurmctld -D -f "$SLURM_CONF" >"$folder/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D -N "$host" -f "$SLURM_CONF" >"$folder/slurmd.log" 2>&1 &
started+=($!)
for _ in $(seq 120); do
    [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && break
    sleep 0.5
done
[ "$(sinfo --noheader --format=%t)" = idle ] || { echo "Slurm did not start" >&2; exit 1; }
"$@"
