#!/usr/bin/env bash
# Bring up a real SLURM cluster of virtual nodes on this one Debian machine: no systemd, no
# cgroups, nothing to configure.  Everything it makes lies in the state folder, but for a bridge
# and network namespaces whose names begin with vsl.
#
#   up.sh [-n NODES] [-g GPUS_PER_NODE] [-d DIR] [-p PAPER_NODES] [-A] [-i]
#     -n  virtual nodes (4), each with its own host name, address, processes and mounts
#     -g  fake GPUs per node (8): SLURM counts and hands them out; no CUDA program can use them
#     -d  state folder (/var/lib/vssl-devcluster): absent, empty or of an earlier cluster; only root
#         may be able to change it, and munge insists that everybody may enter its parents
#     -p  nodes of the partition `paper` (0), known to the scheduler only: for sbatch --test-only
#     -A  without accounting: quicker, but sacct fails and submitit cannot see a job that died
#     -i  only install the packages
#
# Afterwards, with the line that it prints (export SLURM_CONF=...), sbatch, srun, squeue, sacct and
# launch/submit.py work.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/state.sh"
NODES=4 GPUS=8 PAPER=0 ACCOUNTING=1 INSTALL_ONLY=0 DIR=${VSSL_DEVCLUSTER:-$STATE}
while getopts n:g:d:p:Ai option; do case $option in
  n) NODES=$OPTARG ;; g) GPUS=$OPTARG ;; d) DIR=$OPTARG ;; p) PAPER=$OPTARG ;; A) ACCOUNTING=0 ;;
  i) INSTALL_ONLY=1 ;;
  *) exit 2 ;; esac; done
START=$(date +%s.%N)

say() { printf '[%6.2f s] %s\n' "$(echo "$(date +%s.%N) $START" | awk '{print $1 - $2}')" "$*"; }
die() {
  say "FAILED: $*" >&2
  tail -n 5 "$DIR"/log/*.log >&2 2>/dev/null || true
  exit 1
}
wait_for() { # wait_for SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || die "timed out waiting for $what"
    sleep 0.1
  done
}

[ "$(id -u)" = 0 ] || refuse "only root can make network namespaces"
[[ $NODES =~ ^[1-9][0-9]?$ && $GPUS =~ ^[0-9]+$ && $PAPER =~ ^[0-9]+$ ]] ||
  refuse "-n is 1 to 99, -g and -p are numbers"
DIR=${DIR%/}
trusted "$DIR"
[[ -d $(dirname "$DIR") ]] || refuse "$(dirname "$DIR"): no such folder, -d makes only the last one"
# Taking the cluster down deletes the folder.
[[ ! -e $DIR || -e $DIR/nodes || -z $(ls -A "$DIR") ]] ||
  refuse "$DIR holds files of something else: choose another folder with -d"

# ---- packages --------------------------------------------------------------------------------
packages="slurmctld slurmd slurm-client munge iproute2 procps"
[ $ACCOUNTING = 0 ] || packages+=" slurmdbd mariadb-server-core mariadb-client-core mariadb-server"
missing=""
for package in $packages; do
  dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
    missing+=" $package"
done
if [ -n "$missing" ]; then
  say "installing$missing"
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  # Where no policy forbids it, the packages would start daemons of their own.
  policy=/usr/sbin/policy-rc.d ours=""
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; ours=1; }
  # shellcheck disable=SC2086  # a list of words
  { apt-get -o DPkg::Lock::Timeout=300 update &&
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing; } \
    >"$log" 2>&1 || die "apt-get (see $log)"
  rm -f "$log"
  [ -z "$ours" ] || rm -f $policy
fi
[ $INSTALL_ONLY = 0 ] || exit 0
say "packages ready: $(slurmd -V)"

# ---- a clean state folder --------------------------------------------------------------------
[ ! -e "$DIR/nodes" ] || "$HERE/down.sh" -d "$DIR"
[ ! -e /sys/class/net/vslbr0 ] || die "bridge vslbr0 exists: another cluster is up; down.sh -d ITS_DIR"
umask 022
[ -d "$DIR" ] || mkdir "$DIR" # not -p: nobody can have put another one there meanwhile
chmod 755 "$DIR"
echo "$NODES" >"$DIR/nodes"
mkdir -p "$DIR"/{munge,ctld,spool,log,dev,run,mysql}
chmod 700 "$DIR/munge"
export VSSL_DEVCLUSTER=$DIR DIR NODES GPUS PAPER ACCOUNTING CONTROLLER=10.77.0.254
"$HERE/configure.sh"
export SLURM_CONF=$DIR/slurm.conf

munged --key-file="$DIR/munge/munge.key" --socket="$DIR/run/munge.sock" \
  --pid-file="$DIR/run/munged.pid" --log-file="$DIR/munge/munged.log" --seed-file="$DIR/munge/seed"
munge -S "$DIR/run/munge.sock" -n | unmunge -S "$DIR/run/munge.sock" >/dev/null || die munge
say "munged"

# ---- network ---------------------------------------------------------------------------------
ip link add vslbr0 type bridge
ip addr add $CONTROLLER/24 dev vslbr0
ip link set vslbr0 up
for i in $(seq 1 "$NODES"); do
  ip netns add "vsl-n$i"
  ip link add "vsl$i" type veth peer name eth0 netns "vsl-n$i"
  ip link set "vsl$i" master vslbr0 up
  ip -n "vsl-n$i" link set lo up
  ip -n "vsl-n$i" addr add "10.77.0.$i/24" dev eth0
  ip -n "vsl-n$i" link set eth0 up
done
say "network"

# The controller's daemons listen on the address of their host name; `ctl` keeps them off every
# interface but the bridge.
as_controller() {
  setsid unshare --uts --mount bash -c \
    'hostname ctl; mount --bind "$1/hosts" /etc/hosts; exec "$2" -D' - "$DIR" "$1" \
    </dev/null >"$DIR/log/$1.out" 2>&1 &
}

# ---- accounting: a private mariadb without a port, and slurmdbd --------------------------------
if [ $ACCOUNTING = 1 ]; then
  mariadb-install-db --no-defaults --datadir="$DIR/mysql" --user=root --skip-test-db \
    --auth-root-authentication-method=socket --innodb-log-file-size=8M \
    --innodb-flush-method=nosync >"$DIR/log/install-db.log" 2>&1 || die mariadb-install-db
  setsid mariadbd --no-defaults --datadir="$DIR/mysql" --socket="$DIR/run/mysql.sock" \
    --pid-file="$DIR/run/mariadbd.pid" --skip-networking --user=root \
    --innodb-flush-method=nosync --innodb-flush-log-at-trx-commit=0 \
    --innodb-buffer-pool-size=64M --innodb-log-file-size=8M --innodb-lock-wait-timeout=900 \
    </dev/null >"$DIR/log/mariadbd.log" 2>&1 &
  wait_for 60 mariadbd mariadb-admin --no-defaults --socket="$DIR/run/mysql.sock" ping
  export MYSQL_UNIX_PORT="$DIR/run/mysql.sock" # slurmdbd has no setting for a socket elsewhere
  as_controller slurmdbd
  wait_for 20 slurmdbd sacctmgr -n show cluster
  sacctmgr -i add cluster virtual >/dev/null || die "sacctmgr add cluster"
  say "accounting"
fi

# ---- the daemons -----------------------------------------------------------------------------
as_controller slurmctld
for i in $(seq 1 "$NODES"); do "$HERE/node.sh" start "n$i"; done
all_idle() { [ "$(sinfo -h -p train -t idle -o %D)" = "$NODES" ]; }
wait_for 60 "all nodes to be idle" all_idle
srun -N"$NODES" hostname >/dev/null || die srun
say "$NODES nodes of $GPUS fake GPUs are up:"
echo "export SLURM_CONF=$DIR/slurm.conf$([ "$DIR" = "$STATE" ] || echo " VSSL_DEVCLUSTER=$DIR")"
