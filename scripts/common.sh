# shellcheck shell=bash
# What the scripts share: how they speak, wait and find the toolchain. Sourced, never run.

set -euo pipefail

# shellcheck disable=SC2034 # used by the scripts
root_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Numbers with a point, and messages that can be searched for, whatever the user's language.
export LC_ALL=C.UTF-8

# Root by sudo has neither the user's PATH nor home, but should build with the user's Rust.
sudo_user=''
((EUID != 0)) || [[ ${SUDO_USER-root} == root ]] || sudo_user=$SUDO_USER
sudo_home=''
[[ -z $sudo_user ]] || sudo_home=$(getent passwd "$sudo_user" | cut -d : -f 6)

# rustup puts cargo into a home directory, but only login shells learn of it. Before the rest of
# PATH, as there: the distribution's own may be too old.
find_rust() {
    if [[ -x ${CARGO_HOME-}/bin/cargo ]]; then
        PATH=$CARGO_HOME/bin:$PATH
        return
    fi
    local home
    for home in "$HOME" ${sudo_home:+"$sudo_home"}; do
        [[ -x $home/.cargo/bin/cargo || -d $home/.rustup/toolchains ]] || continue
        [[ ! -x $home/.cargo/bin/cargo ]] || PATH=$home/.cargo/bin:$PATH
        # Toolchains are shared with the user, downloaded crates are not: root would own them.
        [[ $home == "$HOME" ]] || export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
        return
    done
}
find_rust

# sysctl, ip and nginx live in sbin, which an unprivileged user's or a cron job's PATH may lack.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

need_root() {
    ((EUID == 0)) || die "$1 needs root: run it with sudo"
}

# What root has built belongs to the owner of the checkout, whose next build would fail otherwise.
give_target_back() {
    ((EUID == 0)) && [[ -d $root_dir/target ]] || return 0
    chown -hR --reference="$root_dir" "$root_dir/target"
}

# Prints the comment at the top of the calling script: it is the manual.
print_help() {
    awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
}

# wait_until SECONDS COMMAND...: polls until the command succeeds; fails after the deadline.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || return 1
        sleep 0.05
    done
}
