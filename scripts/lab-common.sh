# shellcheck shell=bash
# What the labs share: hosts in network namespaces, and processes that end with them. Sourced after
# common.sh by a script that says where its labs are noted (`labs`).
# shellcheck disable=SC2154 # labs is the script's, root_dir is of common.sh

# --- hosts -----------------------------------------------------------------------------------------

inside() {
    local host=$1
    shift
    ip netns exec "$name-$host" "$@"
}

add_host() {
    ip netns add "$name-$1"
    # Duplicate address detection would hold every IPv6 address back for a second or two.
    inside "$1" sysctl -qw net.ipv6.conf.{all,default}.{accept_dad,accept_ra}=0 \
        net.ipv4.conf.{all,default}.rp_filter=0
    ip -n "$name-$1" link set lo up
}

add_addresses() {
    local host=$1 interface=$2
    shift 2
    local address
    for address in "$@"; do
        ip -n "$name-$host" address add "$address" dev "$interface"
    done
}

# --- processes -------------------------------------------------------------------------------------

# A pid alone may belong to a stranger by the time we want to kill it; with its start time it is ours.
# Zero if it is gone already, even if nobody has noticed its end: a zombie.
start_time() {
    local started
    started=$(sed 's/.*) //; s/^Z.*//' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20) || true
    printf '%s' "${started:-0}"
}

start() {
    local host=$1 label=$2
    shift 2
    # exec, so that the pid is the command's own and not that of a shell waiting for it.
    exec ip netns exec "$name-$host" "$@" >>"$state/$label.log" 2>&1 </dev/null &
    record "$label" $!
}

# record LABEL PID: a process that `stop` and `end_started` are to know.
record() { printf '%s %s %s\n' "$1" "$2" "$(start_time "$2")" >>"$state/processes"; }

# One that died before its start time was read is recorded with 0.
is_gone() { [[ $2 == 0 || $(start_time "$1") != "$2" ]]; }

# end_process PID START_TIME SIGNAL
end_process() {
    is_gone "$1" "$2" && return
    kill -s "$3" "$1" 2>/dev/null || true
    wait_until 5 is_gone "$1" "$2" || kill -s KILL "$1" 2>/dev/null || true
    wait_until 5 is_gone "$1" "$2" || die "process $1 does not end, even by SIGKILL"
}

stop() {
    local wanted=$1 signal=${2:-TERM} label pid started found=''
    while read -r label pid started; do
        [[ $label == "$wanted" ]] || continue
        found=1
        end_process "$pid" "$started" "$signal"
    done <"$state/processes"
    [[ -n $found ]] || die "nothing called $wanted was started in lab $name"
}

# Ends all that `start` has started: all are told first, and then waited for.
end_started() {
    local label pid started
    [[ -e $state/processes ]] || return 0
    while read -r label pid started; do
        is_gone "$pid" "$started" || kill -s TERM "$pid" 2>/dev/null || true
    done <"$state/processes"
    while read -r label pid started; do
        end_process "$pid" "$started" TERM
    done <"$state/processes"
}

# Daemons of an interrupted test were not started by us, but would keep the namespace alive.
end_inhabitants() {
    local pid
    for pid in $(ip netns pids "$1"); do
        end_process "$pid" "$(start_time "$pid")" TERM
    done
}

# --- commands --------------------------------------------------------------------------------------

check_name() {
    [[ $1 =~ ^[a-z][a-z0-9-]{0,30}$ ]] ||
        die "a lab's name is small letters, digits and dashes, not '$1'"
}

# open_lab NAME: makes `name`, `state` and the options it was built with known.
open_lab() {
    check_name "$1"
    name=$1
    [[ -L $labs/$name ]] || die "there is no lab $name: see scripts/${0##*/} list"
    state=$(readlink "$labs/$name")
    # shellcheck disable=SC1091
    . "$state/settings"
}

list() {
    [[ -d $labs ]] || return 0
    ls "$labs"
}

# wants COUNT USAGE ARGUMENT...
wants() {
    (($# - 2 >= $1)) || die "usage: scripts/${0##*/} $2"
}
