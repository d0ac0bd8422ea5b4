#!/usr/bin/env bash
# A real SLURM of one node on this machine, for trying things out and for tests/slurm.
#
#   scripts/local_slurm.sh start     install (Debian packages slurm-wlm, munge) and start; as root
#   scripts/local_slurm.sh stop      cancel its jobs and end what `start` has started; as root
#   scripts/local_slurm.sh status    nodes and queue; exit status 1 where no SLURM answers
#
# A SLURM that answers already is used as it is, whoever started it, and never stopped from here.
# Settings: LORA_ONE_SLURM_CPUS, the CPUs that the node claims to have (4). The daemons listen on
# the loopback interface only. Whatever is in the way is said in one line, with exit status 1.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

conf=/etc/slurm/slurm.conf
mark="# made by LoRA-One Lab's scripts/local_slurm.sh"
home=/var/lib/lora-one-slurm
programs=(munged slurmctld slurmd srun sbatch)

tell() { echo "local_slurm: $*"; }
fail() { tell "$*" >&2; exit 1; }

ours() { [ -f "$conf" ] && head -n 1 "$conf" | grep -qxF "$mark"; }
usable_nodes() { timeout 15 sinfo --noheader --states=idle,mixed,allocated --format=%D 2>/dev/null | grep -q '[1-9]'; }
answers() { command -v sinfo >/dev/null && timeout 15 sinfo >/dev/null 2>&1; }
have_all() {
    local program
    for program in "${programs[@]}"; do command -v "$program" >/dev/null || return 1; done
}
signs() { munge -n 2>/dev/null | unmunge >/dev/null 2>&1; }

# pid_of NAME: the process that `start` left in NAME.pid, if it is still that program.
pid_of() {
    local pid
    pid=$(cat "$home/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && echo "$pid"
}

# patiently SECONDS COMMAND...: repeat the command until it succeeds.
patiently() {
    local tries=$(($1 * 5))
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        sleep 0.2
    done
}

# launch NAME COMMAND...: start a daemon; on failure show the end of its log.
launch() {
    local name=$1 log=$home/$1.log
    shift
    # A daemon must not hold the lock, 9, nor what else the caller has open.
    "$@" </dev/null >>"$log" 2>&1 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- || fail "$name did not start: $(tail -n 3 "$log" | tr '\n' ' ')"
}

start() {
    if answers; then
        if usable_nodes; then
            if ours; then
                tell "runs already"
            else
                tell "another SLURM answers here, and is used: partition $(sinfo -h -o '%P, %D node(s)' | head -n 1)"
            fi
            return
        fi
        ours || fail "another SLURM answers here, but has no usable node: $(sinfo -h -o '%P %T' | head -n 1)"
    fi
    [ "$(id -u)" = 0 ] || fail "no SLURM answers here, and only root can start one"
    [ ! -e "$conf" ] || ours || fail "$conf belongs to another SLURM, which does not answer: start that one, or remove the file"
    local address
    address=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 { print $1 }') || true
    # A step is called back at the address of the host name; the daemons listen on the loopback.
    [ "$address" = 127.0.0.1 ] ||
        fail "the host name $(hostname) stands for '$address', not 127.0.0.1: put '127.0.0.1 $(hostname)' first in /etc/hosts"
    mkdir -p "$home"/{controller,node} "$(dirname $conf)"
    exec 9>"$home/lock"
    flock --timeout 300 9 || fail "another start or stop has been at it for five minutes"
    if answers && usable_nodes; then tell "runs already"; return; fi

    have_all || install_packages
    end_daemons
    configure
    signs || start_munge
    patiently 15 signs || fail "munged does not answer: $(tail -n 1 /var/log/munge/munged.log)"
    # Old jobs and credentials would make no sense to a controller that counts from 1 again.
    rm -rf "$home"/controller/* "$home"/node/cred_state*
    launch slurmctld slurmctld
    patiently 30 answers || fail "slurmctld does not answer: $(tail -n 1 "$home/slurmctld.log")"
    launch slurmd slurmd
    patiently 30 usable_nodes || fail "the node does not get ready: $(tail -n 1 "$home/slurmd.log")"
    timeout 30 srun --ntasks=1 --time=1 true 9>&- || fail "the node is ready, but srun cannot run a task"
    tell "started: $(sinfo -h -o 'partition %P of %D node, %c CPUs'); logs in $home"
}

install_packages() {
    command -v apt-get >/dev/null || fail "SLURM is not installed, and there is no apt-get to install it with"
    tell "installing slurm-wlm and munge"
    local log=$home/apt.log
    if ! { timeout 120 apt-get -qy update && DEBIAN_FRONTEND=noninteractive timeout 240 apt-get -qy \
        -o DPkg::Lock::Timeout=100 install --no-install-recommends slurm-wlm munge; } </dev/null >"$log" 2>&1 9>&-; then
        fail "apt-get cannot install slurm-wlm and munge: $(tail -n 1 "$log")"
    fi
    hash -r
    have_all || fail "slurm-wlm and munge are installed, but one of ${programs[*]} is missing"
}

configure() {
    local cpus=${LORA_ONE_SLURM_CPUS:-4} memory
    memory=$(awk '/^MemTotal/ { print int($2 * 0.9 / 1024) }' /proc/meminfo)
    cat >"$conf" <<CONF
$mark
ClusterName=lora-one
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: two minutes by default.
AuthInfo=cred_expire=5
StateSaveLocation=$home/controller
SlurmdSpoolDir=$home/node
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
# No cgroups, mail, MPI or accounting: none of them works in every container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
# Look for jobs to start every other second; end a cancelled one after five.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
KillWait=5
JobRequeue=1
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The node has what is said here, and a job that asks for more is refused.
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$cpus CoresPerSocket=$cpus RealMemory=$memory
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE
CONF
}

start_munge() {
    id munge >/dev/null 2>&1 || fail "the user 'munge', which the package munge makes, is missing"
    install -d -o munge -g munge -m 0700 /etc/munge /var/lib/munge /var/log/munge
    install -d -o munge -g munge -m 0755 /run/munge
    [ -s /etc/munge/munge.key ] || install -o munge -g munge -m 0400 <(head -c 1024 /dev/urandom) /etc/munge/munge.key
    # --force: take over the socket of one that was killed.
    launch munged runuser --user munge -- munged --force
    cp /run/munge/munged.pid "$home/munged.pid"
}

end_daemons() {
    local name pid
    for name in slurmd slurmctld; do
        pid=$(pid_of "$name") || continue
        kill "$pid"
        patiently 10 eval "! kill -0 $pid 2>/dev/null" || kill -KILL "$pid"
        tell "$name has ended"
    done
}

stop() {
    if ! ours; then
        if answers; then tell "not started by this script, left alone"; else tell "nothing to stop"; fi
        return
    fi
    [ "$(id -u)" = 0 ] || fail "only root can stop it"
    exec 9>"$home/lock"
    flock --timeout 300 9 || fail "another start or stop has been at it for five minutes"
    # slurmd would leave the jobs running.
    if answers; then
        squeue --noheader --format=%A | sort -u | xargs --no-run-if-empty timeout 15 scancel --quiet || true
        patiently 20 eval '[ -z "$(squeue -h 2>/dev/null)" ]' || tell "some jobs did not end" >&2
    fi
    end_daemons
    if pid_of munged >/dev/null; then kill "$(pid_of munged)" && tell "munged has ended"; fi
    rm -f "$conf"
    tell "stopped"
}

status() {
    answers || fail "no SLURM answers here"
    if ours; then tell "started by this script"; else tell "not started by this script"; fi
    sinfo
    squeue
}

case ${1:-} in
    start | stop | status) "$1" ;;
    *) echo "usage: scripts/local_slurm.sh start|stop|status" >&2; exit 2 ;;
esac
