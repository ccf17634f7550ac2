#!/usr/bin/env bash
# Write the cluster's configuration into $DIR.  Called by up.sh, which exports the variables.
set -euo pipefail
: "${DIR:?}" "${NODES:?}" "${GPUS:?}" "${PAPER:?}" "${ACCOUNTING:?}" "${CONTROLLER:?}"
. "$(dirname "$0")/state.sh"
trusted "$DIR"

head -c 1024 /dev/urandom >"$DIR/munge/munge.key"
chmod 600 "$DIR/munge/munge.key"

# A GPU that SLURM accepts must be a device file: character device 1,3 is /dev/null.
for i in $(seq 0 $((GPUS - 1))); do
  [ -e "$DIR/dev/nvidia$i" ] || mknod -m 666 "$DIR/dev/nvidia$i" c 1 3
done
echo "AutoDetect=off" >"$DIR/gres.conf"
[ "$GPUS" = 0 ] || echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >>"$DIR/gres.conf"

# Nothing uses cgroups, but slurmd looks for /sys/fs/cgroup unless told which kind there is.
echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf"

{
  echo "127.0.0.1 localhost"
  echo "$CONTROLLER ctl"
  for i in $(seq 1 "$NODES"); do echo "10.77.0.$i n$i"; done
} >"$DIR/hosts"

cat >"$DIR/slurm.conf" <<CONF
ClusterName=virtual
SlurmctldHost=ctl($CONTROLLER)
# Not the usual ports: a real cluster may be configured on this machine.
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# The life of a credential is also how long a requeued job waits (default 120 s).
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
StateSaveLocation=$DIR/ctld
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
# Neither cgroups nor systemd.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
# The nodes are larger than the machine that they are on.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefCpuPerGPU=1
DefMemPerCPU=1000
# Quick reactions, for tests.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=600
# submitit takes the result file of an equal job id for its own: never count from 1 again.
FirstJobId=$(($(date +%s) % 60000000 + 1))
# Otherwise a job too large for the partition is accepted and waits for ever.
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
# Jobs in \`low\` give way to jobs in \`train\`: SIGUSR2 first, then they are requeued.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=DEFAULT CPUs=96 RealMemory=1000000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=train Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=eval Nodes=n[1-$NODES] MaxTime=60 PriorityTier=10 State=UP
PartitionName=low Nodes=n[1-$NODES] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 State=UP
CONF
for i in $(seq 1 "$NODES"); do
  echo "NodeName=n$i NodeAddr=10.77.0.$i Port=17000" >>"$DIR/slurm.conf"
done
if [ "$PAPER" != 0 ]; then # cloud nodes that nobody powers up: the scheduler counts with them
  last=$(printf %04d "$PAPER")
  cat >>"$DIR/slurm.conf" <<CONF
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=86400
SuspendExcNodes=n[1-$NODES]
NodeName=paper[0001-$last] NodeAddr=127.0.0.1 State=CLOUD
PartitionName=paper Nodes=paper[0001-$last] MaxTime=INFINITE State=UP
CONF
fi
if [ "$ACCOUNTING" = 1 ]; then
  cat >>"$DIR/slurm.conf" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$CONTROLLER
AccountingStoragePort=16819
# AuthInfo is not used for this connection.
AccountingStoragePass=$DIR/run/munge.sock
AccountingStorageTRES=gres/gpu
CONF
  cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock
DbdHost=ctl
DbdAddr=$CONTROLLER
DbdPort=16819
SlurmUser=root
CommunicationParameters=NoInAddrAny
DebugLevel=info
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CONF
  chmod 600 "$DIR/slurmdbd.conf"
else
  echo "AccountingStorageType=accounting_storage/none" >>"$DIR/slurm.conf"
fi
