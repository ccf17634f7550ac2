#!/usr/bin/env bash
# Take the cluster of up.sh down: ends only the processes whose ids it recorded.
#
#   down.sh [-d DIR] [-k]     -k keeps the state folder, with its logs
set -uo pipefail
. "$(dirname "$0")/state.sh"
DIR=${VSSL_DEVCLUSTER:-$STATE} KEEP=0
while getopts d:k option; do case $option in d) DIR=$OPTARG ;; k) KEEP=1 ;; *) exit 2 ;; esac; done
DIR=${DIR%/}
trusted "$DIR"
NODES=$(nodes_up "$DIR")
[ "$NODES" != 0 ] || { echo "down.sh: no cluster in $DIR"; exit 0; }
export SLURM_CONF=$DIR/slurm.conf

# end PID_FILE NAME [SIGNAL]: a process id may have been given to somebody else since.
end() {
  [ -s "$1" ] || return 0
  local pid
  pid=$(cat "$1")
  rm -f "$1"
  [[ $pid =~ ^[1-9][0-9]*$ ]] || return 0
  grep -qs "$2" "/proc/$pid/cmdline" || return 0
  kill -"${3:-TERM}" "$pid" 2>/dev/null
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.05
  done
  kill -KILL "$pid" 2>/dev/null
}

timeout 10 scancel -u "$(id -un)" >/dev/null 2>&1 && sleep 1
end "$DIR/run/slurmctld.pid" slurmctld
for file in "$DIR"/run/node-*.pid; do
  [ -e "$file" ] || continue
  parent=$(cat "$file")
  if grep -qs unshare "/proc/$parent/cmdline"; then
    first=$(pgrep -P "$parent" | head -1)
    [ -z "$first" ] || kill -KILL "$first" # pid 1 of the node: all that runs there dies with it
  fi
  end "$file" unshare KILL
done
end "$DIR/run/slurmdbd.pid" slurmdbd
end "$DIR/run/mariadbd.pid" mariadbd
end "$DIR/run/munged.pid" munged
for i in $(seq 1 "$NODES"); do ip netns del "vsl-n$i" 2>/dev/null; done
ip link del vslbr0 2>/dev/null
if [ $KEEP = 1 ]; then echo 0 >"$DIR/nodes"; else rm -rf "$DIR"; fi
exit 0
