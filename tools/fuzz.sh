#!/bin/bash
# libFuzzer, with ASan and UBSan, on every parser of what comes from outside:
#
#   tools/fuzz.sh [-t SECONDS] [-j JOBS] [PARSER...]    60 seconds each, as many at once as cores
#
# Needs clang with its runtime (Debian: clang libclang-rt-14-dev). Inputs that reach new code stay in
# build/fuzz/found/PARSER for the next run; tests/fuzz/corpus is where every run begins. Prints how
# often each parser was run and how far it got. An input that fails is named, its file stays in
# build/fuzz/failed, and the exit status is 1: it goes to tests/fuzz/corpus/PARSER with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=60 jobs=$(nproc)
while getopts t:j: option; do
  case $option in
    t) seconds=$OPTARG ;;
    j) jobs=$OPTARG ;;
    *)
      sed -n '4s/^# *//p' "$0" >&2
      exit 2
      ;;
  esac
done
shift $((OPTIND - 1))

corpus=$PWD/tests/fuzz/corpus build=$PWD/build/fuzz
[ $# -gt 0 ] || set -- $(ls "$corpus")
for parser in "$@"; do
  [ -d "$corpus/$parser" ] || {
    echo "tools/fuzz.sh: no parser $parser; there are $(ls "$corpus" | paste -sd ' ')" >&2
    exit 2
  }
done

cmake --preset fuzz -DCMAKE_CXX_COMPILER_LAUNCHER="$(command -v ccache || true)" > /dev/null
cmake --build --preset fuzz --target $(printf 'fuzz_%s ' "$@")
mkdir -p "$build/failed"

# One parser, and its line of the table.
run_parser() {
  local parser=$1 log=$build/found/$1.log
  mkdir -p "$build/found/$parser"
  local status=0
  "$build/tests/fuzz/fuzz_$parser" -max_total_time="$seconds" -rss_limit_mb=4096 -timeout=25 \
    -print_final_stats=1 -artifact_prefix="$build/failed/$parser-" "$build/found/$parser" \
    "$corpus/$parser" > "$log" 2>&1 || status=$?
  awk -v parser="$parser" -v status="$status" '
    match($0, /cov: [0-9]+/) { edges = substr($0, RSTART + 5, RLENGTH - 5) }
    /stat::number_of_executed_units/ { runs = $2 }
    /Test unit written to/ { input = $NF }
    END { printf "%-14s %12d runs %8d edges   %s\n", parser, runs, edges,
            status == 0 ? "nothing failed" : "FAILED: " input }' "$log"
  return "$status"
}
export -f run_parser
export seconds build corpus

status=0
printf '%s\n' "$@" | xargs -P "$jobs" -I{} bash -c 'run_parser "$1"' _ {} || status=1
exit "$status"
