# Sourced by the other scripts: where the cluster's state is, and whether root may believe it.
STATE=/var/lib/vssl-devcluster

refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# trusted DIR: ends the script unless only root can change DIR, and which folder DIR names.
# What is missing is nobody's; a sticky folder such as /tmp lets nobody rename what is root's.
trusted() {
  [[ $1 =~ ^(/[A-Za-z0-9._-]+)+$ && ! $1/ =~ /\.\.?/ ]] ||
    refuse "-d $(printf %q "$1"): an absolute path of letters, digits, . _ and - is needed"
  local path="" name owner mode kind
  local -a names
  IFS=/ read -r -a names <<<"${1#/}"
  for name in "${names[@]}"; do
    path+=/$name
    [[ -e $path || -L $path ]] || return 0
    read -r owner mode kind < <(stat -c '%u %a %F' "$path")
    [[ $kind != "symbolic link" ]] || refuse "$path is a link: name the folder itself with -d"
    [[ $kind == directory ]] || refuse "$path is no folder: choose another one with -d"
    [[ $owner == 0 ]] || refuse "$path belongs to user $owner, not to root: choose another one with -d"
    ((8#$mode & 8#022)) || continue
    [[ $path != "$1" ]] && ((8#$mode & 8#1000)) ||
      refuse "$path can be written to by others (mode $mode): chmod go-w, or choose another one with -d"
  done
}

# nodes_up DIR: how many nodes were last brought up there; 0 if none, or if it is no such folder.
nodes_up() {
  local text=0
  [[ -L $1/nodes || ! -f $1/nodes ]] || read -r text <"$1/nodes" || true
  [[ $text =~ ^[1-9][0-9]?$ ]] && echo "$text" || echo 0
}
