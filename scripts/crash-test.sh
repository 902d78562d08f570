#!/bin/sh
# The long run of docs/crash-safety.md: crash points, faults, kills, twins. Says at its end how many of
# each there were, and fails if they were fewer than were asked for.
#
#   CRASH_POINTS=120000   points to try
set -eu
cd "$(dirname "$0")/.."
points=${CRASH_POINTS:-120000}
scripts/setup.sh test

# As fast as a release, with the checks of a debug build.
cargo build --profile fuzz --locked --package vmm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A pipe of its own for the figures: the shell tells of the last program of a pipe only.
{
    CRASH_POINTS=$points cargo test --profile fuzz --locked --package block \
        --test crash --test host_calls -- --nocapture 2>&1 &&
        CRASH_POINTS=$points cargo test --profile fuzz --locked --package block \
            --test suite -- --nocapture twin 2>&1 || echo failed >"$work/failed"
} | tee "$work/log"
[ ! -e "$work/failed" ] || exit 1

awk -v wanted="$points" '
    { number = 0; if (match($0, /: [0-9]+/)) number = substr($0, RSTART + 2, RLENGTH - 2) + 0 }
    /crash points tried/ { points += number }
    /faults injected/ { faults += number }
    /short transfers/ { short += number }
    /processes killed/ { kills += number }
    END {
        printf "crash-test: %d crash points, %d faults, %d operations with short transfers, %d kills\n", \
            points, faults, short, kills
        if (points < wanted || kills < 200 || faults == 0) {
            print "crash-test: fewer than were asked for"
            exit 1
        }
    }' "$work/log"
