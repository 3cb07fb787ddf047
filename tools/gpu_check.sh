#!/usr/bin/env bash
# Builds for the GPU at hand, tests, checks and measures on it; one results folder, each stage writing
# its part as it ends. About 9 minutes in all on a 16-core machine with an H200; no network needed.
#
#   tools/gpu_check.sh [-o results] [-a 90a] [stage ...]
#
# Stages: build test sanitize bench torch sass report. Without a list: all of them. A stage that
# fails or outlives its limit does not stop the next one; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:+$OUT/gpu_check}
out=${out:-results/gpu_check}
arch=90a
while getopts "o:a:" option; do
  case $option in
    o) out=$OPTARG ;;
    a) arch=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
stages=("$@")
[ ${#stages[@]} -eq 0 ] && stages=(build test sanitize bench torch sass report)
mkdir -p "$out"
build=build/gpu-check
failed=0

# run NAME SECONDS COMMAND...: one stage's step, its output in NAME.log, its end in stages.txt.
run() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  local result=passed
  [ $status -eq 124 ] && result="stopped after $limit s"
  [ $status -ne 0 ] && [ $status -ne 124 ] && result="failed with status $status"
  [ $status -ne 0 ] && failed=1
  echo "$name: $result in $((SECONDS - start)) s" | tee -a "$out/stages.txt"
  [ $status -ne 0 ] && tail -5 "$out/$name.log"
  return 0
}

missing() { echo "$1: skipped, $2 is not available" | tee -a "$out/stages.txt"; }

stage_build() {
  local generator=()
  command -v ninja > /dev/null && generator=(-G Ninja)
  run configure 60 cmake -S . -B $build "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
    -DMUSTAFAR_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$arch" -DMUSTAFAR_BUILD_TESTS=ON \
    -DMUSTAFAR_BUILD_PYTHON=OFF -DMUSTAFAR_BUILD_CLI=OFF
  run build 240 cmake --build $build -j "$(nproc)" --target mustafar_tests mustafar_cuda_bench
}

stage_test() { run test 60 $build/tests/mustafar_tests --gtest_filter='Cuda*'; }

stage_sanitize() {
  command -v compute-sanitizer > /dev/null || { missing sanitize compute-sanitizer; return; }
  local small='CudaSession.EqualsTheCpu'
  run memcheck 45 compute-sanitizer --error-exitcode 9 $build/tests/mustafar_tests \
    --gtest_filter="$small"
  run racecheck 45 compute-sanitizer --tool racecheck --error-exitcode 9 \
    $build/tests/mustafar_tests --gtest_filter="$small"
}

stage_bench() {
  run bench 120 $build/tools/mustafar_cuda_bench 0.2
  grep '^{' "$out/bench.log" > "$out/bench.jsonl"
}

stage_torch() {
  python3 -c 'import torch' 2> /dev/null || { missing torch PyTorch; return; }
  run torch 60 python3 tools/bench_torch_attention.py
  grep '^{' "$out/torch.log" > "$out/torch.jsonl"
}

stage_sass() {
  command -v cuobjdump > /dev/null || { missing sass cuobjdump; return; }
  local objects
  objects=$(find $build -name 'decode_attention_*.o')
  # shellcheck disable=SC2086
  run sass 60 python3 tools/sass_count.py $objects --markdown "$out/sass.md"
}

stage_report() { run report 20 python3 tools/gpu_report.py "$out"; }

: > "$out/stages.txt"
{
  echo "commit $(git rev-parse HEAD 2> /dev/null || echo unknown)"
  echo "cuda_hash $(cat cuda/*.cu cuda/*.cuh cuda/*.cc cuda/*.h | sha256sum | cut -c1-16)"
  echo "gpu $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null ||
    echo 'none: nvidia-smi is missing or fails')"
  echo "nvcc $(nvcc --version 2> /dev/null | tail -2 | head -1 || echo none)"
} > "$out/machine.txt"
for stage in "${stages[@]}"; do
  declare -F "stage_$stage" > /dev/null || { echo "no stage $stage"; exit 2; }
  "stage_$stage"
done
echo "results in $out"
exit $failed
