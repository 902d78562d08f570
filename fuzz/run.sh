#!/bin/sh
# Builds the fuzzers and runs them side by side.
#
#   fuzz/run.sh SECONDS [TARGET...]    all targets, if none is named
#
# Coverage and the address sanitizer need options that the stable compiler keeps for nightly builds;
# RUSTC_BOOTSTRAP takes them all the same. What is found stays in target/fuzz/TARGET/, as do the
# corpora, which the next run goes on from. `cargo fuzz run TARGET --features libfuzzer` works too.
# FUZZ_TIMEOUT=SECONDS, 20 if not set: what counts as a hang; more on a machine that is busy.
#
# Leaks are not looked for, neither after an input nor at the end: threads of the request pool that are
# just being started look like some.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:?seconds}
shift
[ $# -gt 0 ] || set -- open read write check nbd qmp

triple=$(rustc -vV | sed -n 's/^host: //p')
out=${CARGO_TARGET_DIR:-target}
out=$(mkdir -p "$out" && cd "$out" && pwd)/fuzz
export CARGO_TARGET_DIR="$out/build"
cargo build --quiet --locked --package tardigrade-fuzz --bin seeds
export ASAN_OPTIONS=detect_leaks=0
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares"
RUSTC_BOOTSTRAP=1 RUSTFLAGS="--cfg fuzzing $coverage -Zsanitizer=address" \
    cargo build --quiet --locked --profile fuzz --target "$triple" \
    --package tardigrade-fuzz --features libfuzzer --bins

# A finding ends the fuzzer; it begins again until the time is over.
fuzz() { # target
    cd "$out/$1"
    rm -f log.*
    end=$(($(date +%s) + seconds))
    round=0 failed=0
    while left=$((end - $(date +%s))) && [ $left -gt 0 ] && [ $round -lt 100 ]; do
        "$CARGO_TARGET_DIR/$triple/fuzz/$1" corpus seeds -artifact_prefix=found/ \
            -max_total_time="$left" -timeout=${FUZZ_TIMEOUT:-20} -detect_leaks=0 -rss_limit_mb=1024 -malloc_limit_mb=256 \
            -max_len=262144 -len_control=0 -print_final_stats=1 >log.$round 2>&1 || failed=1
        round=$((round + 1))
    done
    return $failed
}

pids=""
for target in "$@"; do
    dir=$out/$target
    mkdir -p "$dir/corpus" "$dir/seeds" "$dir/found"
    "$CARGO_TARGET_DIR/debug/seeds" write "$target" "$dir/seeds"
    fuzz "$target" &
    pids="$pids $!"
done
trap 'kill $pids 2>/dev/null || true' INT TERM
failed=0
for pid in $pids; do wait "$pid" || failed=1; done
for target in "$@"; do
    sed -n 's/^stat::number_of_executed_units: *//p' "$out/$target"/log.* |
        awk -v target="$target" '{ n += $1 } END { print target ": " n + 0 " executions" }'
    find "$out/$target/found" -type f | sed "s|^|  found: |"
done
exit $failed
