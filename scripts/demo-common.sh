# shellcheck shell=bash
# How the demos speak, and what they build with. Sourced after common.sh.

# --- speaking --------------------------------------------------------------------------------------

green='' red='' bold='' plain=''
if [[ -t 1 && -z ${NO_COLOR-} ]]; then
    green=$'\e[32m' red=$'\e[31m' bold=$'\e[1m' plain=$'\e[0m'
fi

title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
row() {
    local label=$1
    shift
    printf '  %-10s %s\n' "$label" "$*"
}
good() { printf '  %s✓%s %s\n' "$green" "$plain" "$*"; }
fail() {
    printf '\n%s✗ not as it should be:%s %s\n' "$red" "$plain" "$*" >&2
    exit 1
}

# expect SENTENCE COMMAND...: the sentence is printed if the command succeeds, and denied if not.
expect() {
    local sentence=$1
    shift
    "$@" >/dev/null 2>&1 || fail "expected: $sentence"
    good "$sentence"
}

prepare_build() {
    local started=$EPOCHREALTIME
    cargo build --locked --release --quiet --package control --bin wiremesh
    give_target_back
    row "build" "release, $(($(elapsed_ms "$started") / 1000)) s"
}

# curl reports seconds with six digits behind the point; people read milliseconds.
in_ms() {
    local us=$((10#${1/./}))
    printf '%d.%d ms' $((us / 1000)) $((us % 1000 / 100))
}
elapsed_ms() { printf '%d' $(((${EPOCHREALTIME/./} - ${1/./}) / 1000)); }
bar() { printf '█%.0s' $(seq $((($1 + 5) / 10))); }
