#!/bin/bash
# A real SLURM on this one machine, to try launch=slurm without a cluster. Root, Linux; Debian: apt install slurm-wlm munge
#
#     eval "$(scripts/local_slurm.sh start [NODES=2] [FOLDER=.slurm])"     sets SLURM_CONF; then sinfo, sbatch, run.py launch=slurm ...
#     scripts/local_slurm.sh stop [FOLDER=.slurm]
#
# slurmctld, munged and one slurmd a node, each node with a host name of its own (node1, node2, ...) on the loopback device. Everything
# they write lies in FOLDER. No accounting (sacct), no cgroups: a job may use the whole machine.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
fail() { echo "local_slurm: $*" >&2; exit 1; }
[ $# -ge 1 ] || fail "usage: scripts/local_slurm.sh start [NODES] [FOLDER] | stop [FOLDER]"

ours() { [ -e "$1/etc/munge.key" ] && grep -qsx 'ClusterName=local' "$1/etc/slurm.conf"; }

stop() {
    local pids=() file pid
    for file in "$folder"/run/slurmd.*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
        if [ -s "$file" ]; then pids+=("$(cat "$file")"); fi
    done
    if [ -e "$folder/etc/slurm.conf" ]; then
        SLURM_CONF=$folder/etc/slurm.conf timeout 10 scancel --state=RUNNING --signal=KILL --full -u root 2>/dev/null || true
    fi
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for _ in $(seq 1 100); do
        local alive=
        for pid in "${pids[@]}"; do if kill -0 "$pid" 2>/dev/null; then alive=1; fi; done
        [ -n "$alive" ] || break
        sleep 0.1
    done
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    rm -rf "$folder"
}

if [ "$1" = stop ]; then
    folder=$(realpath -m "${2:-$here/.slurm}")
    ours "$folder" || fail "no cluster of this script's in $folder"
    stop
    exit
fi
[ "$1" = start ] || fail "usage: scripts/local_slurm.sh start [NODES] [FOLDER] | stop [FOLDER]"
nodes=${2:-2}
folder=$(realpath -m "${3:-$here/.slurm}")
[ "$(id -u)" = 0 ] || fail "the daemons of SLURM want root here"
for tool in slurmctld slurmd munged unshare; do
    command -v $tool >/dev/null || fail "$tool is missing. On Debian and Ubuntu: apt install slurm-wlm munge"
done
if [ -e "$folder" ]; then
    ours "$folder" || fail "$folder is there already, and no cluster of this script's: name another folder"
    fail "$folder is there already: scripts/local_slurm.sh stop $folder"
fi
trap 'stop >&2' ERR INT TERM
mkdir -p "$folder"/{etc,log,run,state,spool}
chmod 755 "$folder"
cores=$(nproc) port=${PORT:-16817}

head -c 1024 /dev/urandom >"$folder/etc/munge.key"
chmod 600 "$folder/etc/munge.key"
munged --force --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.socket" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/state/munge.seed" >&2

export SLURM_CONF=$folder/etc/slurm.conf
cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a short life of credentials: a job that is queued again waits for their end
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdSpoolDir=$folder/spool/%n
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=${KILL_WAIT:-10}
CompleteWait=0
SlurmctldTimeout=30
SlurmdTimeout=30
PropagateResourceLimits=NONE
NodeName=DEFAULT CPUs=$((cores < 8 ? 8 : cores)) RealMemory=1000 State=UNKNOWN
$(for i in $(seq 1 "$nodes"); do echo "NodeName=node$i NodeHostname=node$i NodeAddr=127.0.1.$i Port=$((port + 100 + i))"; done)
PartitionName=local Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP
END
slurmctld -i >&2
# a host name and an /etc/hosts of its own for each node, so that they find each other by name; the machine's stay as they are
{ cat /etc/hosts; for i in $(seq 1 "$nodes"); do echo "127.0.1.$i node$i"; done; } >"$folder/etc/hosts"
for i in $(seq 1 "$nodes"); do
    mkdir "$folder/spool/node$i"
    unshare --uts --mount bash -c "hostname node$i; mount --bind '$folder/etc/hosts' /etc/hosts; exec slurmd -N node$i" >&2
done
for _ in $(seq 1 200); do
    idle=$(timeout 3 sinfo -h -N -o '%N %T' 2>/dev/null | grep -c ' idle$' || true)
    [ "$idle" != "$nodes" ] || break
    sleep 0.1
done
if [ "$idle" != "$nodes" ]; then
    tail -n 3 "$folder"/log/*.log >&2
    stop
    fail "the nodes did not come up"
fi
trap - ERR INT TERM
echo "local_slurm: $nodes nodes" >&2
echo "export SLURM_CONF=$SLURM_CONF"
