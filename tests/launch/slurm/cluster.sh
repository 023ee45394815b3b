#!/usr/bin/env bash
# A Slurm cluster of two nodes on one machine: munged, MariaDB, slurmdbd, slurmctld and two slurmd,
# all of its own, in one folder, on ports of the loopback interface.
#
#   apt-get install slurm-wlm slurmdbd munge mariadb-server     (Debian 12 or later; needs root)
#   cluster.sh start FOLDER     then export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh stop FOLDER
#
# Job accounting is there because TorchX asks sacct how a job is. The nodes' names are added to
# /etc/hosts while the cluster runs: workers meet at the name of their first node.
set -euo pipefail

MARK="# shardrec test cluster"
FOLDER=$(realpath -m "${2:?a folder}")
export SLURM_CONF="$FOLDER/slurm.conf"

daemon() {  # NAME COMMAND…: run in the background and remember the process
    local name=$1
    shift
    nohup "$@" >"$FOLDER/$name.out" 2>&1 </dev/null &
    echo $! >"$FOLDER/$name.pid"
}

until_true() {  # SECONDS COMMAND…
    local left=$(($1 * 5))
    shift
    until "$@" >/dev/null 2>&1; do
        ((left-- > 0)) || { echo "no success in time: $*; see $FOLDER" >&2; return 1; }
        sleep 0.2
    done
}

write_configs() {
    local host cpus
    host=$(hostname)
    cpus=$(nproc --all)
    cat >"$FOLDER/slurm.conf" <<END
ClusterName=shardrec
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool.%n
SlurmctldPidFile=$FOLDER/slurmctld.own.pid
SlurmdPidFile=$FOLDER/slurmd.%n.own.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass=$FOLDER/munge.socket
JobAcctGatherType=jobacct_gather/none
NodeName=node[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=$cpus RealMemory=4096
PartitionName=test Nodes=node[1-2] Default=YES State=UP
END
    cat >"$FOLDER/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
PidFile=$FOLDER/slurmdbd.own.pid
LogFile=$FOLDER/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16806
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
END
    chmod 600 "$FOLDER/slurmdbd.conf"
}

start_database() {
    mariadb-install-db --no-defaults --user=root --datadir="$FOLDER/database" >/dev/null
    daemon mariadbd mariadbd --no-defaults --user=root --datadir="$FOLDER/database" \
        --socket="$FOLDER/database.socket" --bind-address=127.0.0.1 --port=16806
    local client=(mariadb --no-defaults --socket="$FOLDER/database.socket" -u root)
    until_true 60 "${client[@]}" -e "select 1"
    "${client[@]}" -e "create database slurm;
        grant all on slurm.* to 'slurm'@'127.0.0.1' identified by 'slurm';
        grant all on slurm.* to 'slurm'@'localhost' identified by 'slurm'"
}

start() {
    mkdir -p "$FOLDER/state"
    chmod 755 "$FOLDER"
    head -c 1024 /dev/urandom >"$FOLDER/munge.key"
    chmod 600 "$FOLDER/munge.key"
    write_configs
    grep -q "$MARK" /etc/hosts || echo "127.0.0.1 node1 node2 $MARK" >>/etc/hosts
    daemon munged munged --foreground --force --key-file "$FOLDER/munge.key" \
        --socket "$FOLDER/munge.socket" --pid-file "$FOLDER/munged.own.pid" \
        --log-file "$FOLDER/munged.log" --seed-file "$FOLDER/munged.seed"
    start_database
    daemon slurmdbd slurmdbd -D
    until_true 60 sacctmgr -n show cluster
    sacctmgr -i add cluster shardrec >/dev/null
    daemon slurmctld slurmctld -D -c
    daemon slurmd.node1 slurmd -D -N node1
    daemon slurmd.node2 slurmd -D -N node2
    until_true 60 nodes_are_idle
    echo "export SLURM_CONF=$SLURM_CONF"
}

nodes_are_idle() {
    [[ $(sinfo -h -o "%T %D") == "idle 2" ]]
}

stop() {
    local name pid
    for name in slurmd.node1 slurmd.node2 slurmctld slurmdbd mariadbd munged; do
        [[ -f "$FOLDER/$name.pid" ]] || continue
        pid=$(<"$FOLDER/$name.pid")
        kill "$pid" 2>/dev/null || true
        until_true 20 is_gone "$pid" || kill -9 "$pid" || true
        rm -f "$FOLDER/$name.pid"
    done
    sed "/$MARK/d" /etc/hosts >"$FOLDER/hosts" && cat "$FOLDER/hosts" >/etc/hosts
}

is_gone() {
    ! kill -0 "$1" 2>/dev/null
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    *) echo "usage: cluster.sh start|stop FOLDER" >&2; exit 2 ;;
esac
