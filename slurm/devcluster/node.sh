#!/usr/bin/env bash
# One virtual node of the cluster that up.sh made.
#
#   node.sh start NODE            boot it
#   node.sh stop NODE             shut it down in order
#   node.sh crash NODE            every process of the node dies at once
#   node.sh partition|heal NODE   pull its network cable, plug it in again
#   node.sh exec NODE COMMAND...  run a command on it, as ssh would
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
command=$1 node=$2
shift 2
. "$(dirname "$0")/state.sh"
DIR=${VSSL_DEVCLUSTER:-$STATE}
trusted "$DIR"
[[ $node =~ ^n[0-9]+$ ]] || { echo "node.sh: $node is not a node (n1, n2, ...)" >&2; exit 2; }
pid_file=$DIR/run/node-$node.pid

# The recorded process is `unshare --kill-child`; its only child is pid 1 of the node.
first_process() { pgrep -P "$(cat "$pid_file")" | head -1; }

case $command in
  start)
    mkdir -p "$DIR/spool/$node"
    VSSL_DEVCLUSTER=$DIR setsid ip netns exec "vsl-$node" \
      unshare --fork --kill-child --pid --uts --mount --mount-proc "$0" init "$node" \
      </dev/null >>"$DIR/log/node-$node.out" 2>&1 &
    echo $! >"$pid_file"
    ;;
  init) # pid 1 of the node: reaps orphans, and takes every process of the node with it
    hostname "$node"
    mount --bind "$DIR/hosts" /etc/hosts
    mount --bind "$DIR" /etc/slurm # as on a real node, where SLURM_CONF need not be set
    slurmd -D -N "$node" &
    slurmd=$!
    trap 'kill $slurmd' TERM
    while kill -0 $slurmd 2>/dev/null; do wait $slurmd || true; done
    ;;
  stop) kill -TERM "$(first_process)" ;;
  crash) kill -KILL "$(first_process)" ;;
  partition) ip link set "vsl${node#n}" down ;;
  heal) ip link set "vsl${node#n}" up ;;
  exec)
    exec nsenter --target "$(first_process)" --net --pid --uts --mount --wd="$PWD" "$@"
    ;;
  *)
    echo "node.sh: $command is not one of start, stop, crash, partition, heal, exec" >&2
    exit 2
    ;;
esac
