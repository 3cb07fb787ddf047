#!/usr/bin/env bash
# Builds for the GPU at hand, tests, measures and checks on it; one results folder, written anew after
# every stage. Fits into 9 minutes on a 16-core machine with an H200; no network needed.
#
#   tools/gpu_check.sh [-n] [-o folder] [-a 90a] [-t seconds] [-d folder] [stage ...]
#
# Stages, all by default: build test bench torch sanitize sass. -n prints what would run. -t: seconds in
# all. -d: where libraries that the machine lacks were unpacked (headers and archives of PCRE2,
# nlohmann-json and GoogleTest, e.g. by dpkg -x), searched first.
#
# A stage that fails, outlives its limit or finds no tool does not stop the next one. Exit status: 0
# all passed, 1 one failed, 3 none failed but one could not run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

out=${OUT:-results}/gpu_check
arch=90a total=540 libraries='' dry=''
while getopts "no:a:t:d:" option; do
  case $option in
    n) dry=yes ;;
    o) out=$OPTARG ;;
    a) arch=$OPTARG ;;
    t) total=$OPTARG ;;
    d) libraries=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
stages=("$@")
[ ${#stages[@]} -eq 0 ] && stages=(build test bench torch sanitize sass)
build=build/gpu-check
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
raw=$scratch/raw  # what the stages print; packed into one file of the results
python=$(command -v python3 || true)
failed=0 missing=0

# note STAGE TEXT: how a stage ended.
note() { echo "$1: $2" | tee -a "$raw/stages.txt"; }
unavailable() {
  note "$1" "not available: $2"
  missing=1
}

# step NAME SECONDS COMMAND...: a part of a stage, its output in NAME.log.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0 left=$((total - SECONDS))
  shift 2
  if [ -n "$dry" ]; then
    echo "$name ($limit s): $*"
    return 0
  fi
  if [ $left -lt 5 ]; then
    note "$name" "not run: the $total s are over"
    missing=1
    return 1
  fi
  [ "$limit" -gt $left ] && limit=$left
  timeout "$limit" "$@" > "$raw/$name.log" 2>&1 || status=$?
  local took=$((SECONDS - start)) tests='' skipped
  case $status in
    0)
      skipped=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) test.*/\1/p' "$raw/$name.log" | head -1)
      if [ -n "$skipped" ]; then
        tests=", $skipped tests SKIPPED"
        if ! grep -q '^\[  PASSED  \] [1-9]' "$raw/$name.log"; then
          unavailable "$name" "every test was skipped"
          return 1
        fi
      fi
      note "$name" "passed in $took s$tests"
      ;;
    124) note "$name" "failed: stopped after $limit s" ;;
    *) note "$name" "failed with status $status in $took s" ;;
  esac
  [ $status -eq 0 ] && return 0
  failed=1
  tail -5 "$raw/$name.log"
  return 1
}

# needs STAGE WHAT CONDITION...: whether a stage can run; says so where it can't.
needs() {
  local stage=$1 what=$2
  shift 2
  "$@" > /dev/null 2>&1 && return 0
  if [ -n "$dry" ]; then echo "$stage: not available: $what"; else unavailable "$stage" "$what"; fi
  return 1
}
has_gpu() { nvidia-smi -L; }
has_torch() {
  [ -n "$python" ] && "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'
}
built() { [ -n "$dry" ] || [ -x "$1" ]; }

stage_build() {
  needs build nvcc command -v nvcc || return
  needs build cmake command -v cmake || return
  local options=(-DCMAKE_BUILD_TYPE=Release -DMUSTAFAR_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$arch"
    -DMUSTAFAR_BUILD_TESTS=ON -DMUSTAFAR_BUILD_PYTHON=OFF -DMUSTAFAR_BUILD_CLI=OFF)
  command -v ninja > /dev/null && options+=(-G Ninja)
  [ -n "$libraries" ] && options+=("-DCMAKE_PREFIX_PATH=$(realpath "$libraries")/usr")
  step configure 60 cmake -S . -B $build/tree "${options[@]}" || return
  step build 240 cmake --build $build/tree -j "$(nproc)" \
    --target mustafar_tests mustafar_cuda_bench
}

stage_test() {
  needs test "an NVIDIA GPU" has_gpu || return
  needs test "the test program" built $build/tree/tests/mustafar_tests || return
  step test 90 $build/tree/tests/mustafar_tests --gtest_filter='Cuda*'
}

stage_bench() {
  needs bench "an NVIDIA GPU" has_gpu || return
  needs bench "the benchmark" built $build/tree/tools/mustafar_cuda_bench || return
  step bench 120 $build/tree/tools/mustafar_cuda_bench 0.2
}

stage_torch() {
  needs torch "PyTorch with CUDA" has_torch || return
  step torch 60 "$python" tools/bench_torch_attention.py
}

stage_sanitize() {
  needs sanitize compute-sanitizer command -v compute-sanitizer || return
  needs sanitize "an NVIDIA GPU" has_gpu || return
  needs sanitize "the test program" built $build/tree/tests/mustafar_tests || return
  local tool
  for tool in memcheck racecheck synccheck; do
    step $tool 40 compute-sanitizer --tool $tool --error-exitcode 9 \
      $build/tree/tests/mustafar_tests --gtest_filter='CudaSession.EqualsTheCpu*'
  done
}

stage_sass() {
  needs sass Python command -v python3 || return
  needs sass cuobjdump command -v cuobjdump || return
  needs sass "the kernels" built $build/tree/tests/mustafar_tests || return
  local objects=()
  mapfile -t objects < <(find $build/tree/cuda -name 'decode_attention_*.o' 2> /dev/null)
  step sass 60 "$python" tools/sass_count.py "${objects[@]}" --ptxas "$raw/build.log" \
    --markdown "$raw/sass.md"
}

for stage in "${stages[@]}"; do
  declare -F "stage_$stage" > /dev/null || { echo "no stage $stage" >&2; exit 2; }
done
if [ -n "$dry" ]; then
  for stage in "${stages[@]}"; do "stage_$stage"; done
  exit 0
fi

mkdir -p "$raw" "$out" || exit 2
: > "$raw/stages.txt"
version=$(nvcc --version 2> /dev/null | sed -n 's/^Cuda compilation tools, //p')
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -1)
{
  echo "commit $(git rev-parse HEAD 2> /dev/null || echo unknown)"
  echo "cuda_hash $(cat cuda/*.cu cuda/*.cuh cuda/*.cc cuda/*.h | sha256sum | cut -c1-16)"
  echo "gpu ${gpu:-not available}"
  echo "nvcc ${version:-not available}"
  echo "architecture sm_$arch"
} > "$raw/machine.txt"
for stage in "${stages[@]}"; do
  "stage_$stage"
  tar -czf "$out/raw.tar.gz" -C "$scratch" raw
  if [ -n "$python" ]; then
    "$python" tools/gpu_report.py "$raw" "$out" > /dev/null || failed=1
  fi
done
[ -n "$python" ] || unavailable report Python
echo "results in $out"
[ $failed -ne 0 ] && exit 1
[ $missing -ne 0 ] && exit 3
exit 0
