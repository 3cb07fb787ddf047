#!/usr/bin/env bash
# Tests, measures and checks on the GPU at hand what tools/gpu_prebuild.sh built, without a compiler,
# libraries of ours or a network; one results folder, written anew after every stage.
#
#   tools/gpu_check.sh [-n] [-p prebuilt] [-o results] [-t seconds] [stage ...]
#
# Where a GPU is lent for 15 minutes, in two calls with the prebuilt folder carried along:
#
#   tools/gpu_check.sh -o "$OUT" -t 280 first
#   tools/gpu_check.sh -o "$OUT" -t 400 second
#
# Stages: environment smoke bench prefill linear torch step kernels sessions model profile; batch serve
# more sanitize. "first" (the default) is those before the semicolon, "second" adds more and sanitize.
# serve wants the package in the prebuilt folder (tools/gpu_prebuild.sh -w); MUSTAFAR_SERVE_SHAPE, _BUDGET,
# _CLIENTS and _OUTPUT change its traffic, MUSTAFAR_FAST_FOLDER where its weights lie. -n prints what would run.
# -p: .gpu. -t: seconds in all, 280.
#
# A stage that fails, outlives its limit or finds no tool does not stop the next one. Exit status: 0
# all passed, 1 one failed, 3 none failed but one could not run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

out=${OUT:-results/gpu_check}
prebuilt=.gpu total=280 dry=''
while getopts "no:p:t:" option; do
  case $option in
    n) dry=yes ;;
    o) out=$OPTARG ;;
    p) prebuilt=$OPTARG ;;
    t) total=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
first=(environment smoke bench prefill linear torch step kernels sessions model profile)
stages=()
for stage in "${@:-first}"; do
  case $stage in
    first) stages+=("${first[@]}") ;;
    second) stages+=("${first[@]}" more sanitize) ;;
    *) stages+=("$stage") ;;
  esac
done
scratch=$(mktemp -d)
bin=$scratch/bin
trap 'rm -rf "$scratch"' EXIT
raw=$scratch/raw  # what the stages print; packed into one file of the results
python=$(command -v python3 || true)
failed=0 missing=0
# The trained tests look for checkpoints beside their source tree.
export MUSTAFAR_SOURCE_DIR=$scratch/repo
mkdir "$scratch/repo"
ln -s "$PWD/python" "$scratch/repo/python"
ln -s "$(realpath -m "$prebuilt")/shared" "$scratch/shared"
for archive in bin server; do
  archive=$prebuilt/$archive.tar.xz
  if [ -e "$archive" ] && ! tar -xJf "$archive" -C "$scratch" 2> /dev/null; then
    "$python" -m tarfile -e "$archive" "$scratch"  # no xz here
  fi
done

# note STAGE TEXT: how a stage ended.
note() { echo "$1: $2" | tee -a "$raw/stages.txt"; }
unavailable() {
  note "$1" "not available: $2"
  missing=1
}

# verdict NAME STATUS SECONDS LIMIT: notes how a command ended whose output is NAME.log.
verdict() {
  local name=$1 status=$2 took=$3 limit=$4 skipped tests=''
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
      return 0
      ;;
    124) note "$name" "failed: stopped after $limit s" ;;
    *) note "$name" "failed with status $status in $took s" ;;
  esac
  failed=1
  grep -aE '^\[  FAILED  \]|[Ee]rror|ERROR' "$raw/$name.log" | head -5
  tail -3 "$raw/$name.log"
  return 1
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
  verdict "$name" $status $((SECONDS - start)) "$limit"
}

# suites PROGRAM SECONDS FILTER: the test suites that match, each in a process of its own, several at a
# time: what one breaks on the device does not spoil the next.
suites() {
  local program=$1 limit=$2 filter=$3 suite start=$SECONDS
  if [ -n "$dry" ]; then
    echo "$program $filter ($limit s), suite by suite"
    return 0
  fi
  [ $((total - SECONDS)) -lt "$limit" ] && limit=$((total - SECONDS))
  [ "$limit" -lt 5 ] && { note "$program" "not run: the $total s are over"; missing=1; return 1; }
  local names=()
  mapfile -t names < <("$bin/$program" --gtest_list_tests "--gtest_filter=$filter" |
    sed -n 's/^\([^ ]*\)\.\( .*\)\?$/\1/p')
  for suite in "${names[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge 8 ]; do sleep 0.1; done
    (
      name=${suite//\//_}
      status=0
      timeout "$limit" "$bin/$program" "--gtest_filter=$suite.*" > "$raw/$name.log" 2>&1 || status=$?
      echo "$status $SECONDS" > "$scratch/$name.end"
    ) &
  done
  wait
  for suite in "${names[@]}"; do
    local name=${suite//\//_} status took
    read -r status took < "$scratch/$name.end"
    verdict "$name" "$status" $((took - start)) "$limit"
  done
}

# needs STAGE WHAT CONDITION...: whether a stage can run; says so where it can't.
needs() {
  local stage=$1 what=$2
  shift 2
  "$@" > /dev/null 2>&1 && return 0
  if [ -n "$dry" ]; then
    echo "$stage: not available here: $what"
    return 0
  fi
  unavailable "$stage" "$what"
  return 1
}
has_gpu() { nvidia-smi -L; }
has_torch() {
  [ -n "$python" ] && "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'
}
# program STAGE NAME: whether a GPU and the prebuilt program are there.
program() {
  needs "$1" "an NVIDIA GPU" has_gpu && needs "$1" "$2 in $prebuilt/bin.tar.xz (tools/gpu_prebuild.sh)" test -x "$bin/$2"
}

stage_environment() {
  needs environment "an NVIDIA GPU" has_gpu || return
  step environment 20 bash -c 'nvidia-smi; uname -r; nproc; free -g'
}

# One small shape at every setting: a broken kernel shows here, and compute-sanitizer says where.
stage_smoke() {
  program smoke mustafar_cuda_bench || return
  step smoke 40 "$bin/mustafar_cuda_bench" 0.02 2,1000,32,8,2 && [ -z "$dry" ] && return
  needs smoke_memcheck compute-sanitizer command -v compute-sanitizer || return
  step smoke_memcheck 60 compute-sanitizer "$bin/mustafar_cuda_bench" 0.01 2,300,32,8,2
}

stage_kernels() {
  program kernels mustafar_cuda_kernel_tests || return
  suites mustafar_cuda_kernel_tests 90 '*'
}

stage_sessions() {
  program sessions mustafar_tests || return
  suites mustafar_tests 90 'Cuda*:*WholeModel*-*Slow*'
}

bench_shapes() {
  local shape
  for shape in "$@"; do
    step "bench_${shape//,/_}" 60 "$bin/mustafar_cuda_bench" 0.15 "$shape"
  done
}
shapes=(8,32768,32,8 1,32768,32,8 1,16640,32,8 8,4096,32,8 8,32768,64,8)
more_shapes=(1,131072,32,8 32,4096,32,8 8,32768,32,32 32,32768,32,8)
stage_bench() {
  program bench mustafar_cuda_bench || return
  bench_shapes "${shapes[@]}"
}
stage_more() {
  program more mustafar_cuda_bench || return
  bench_shapes "${more_shapes[@]}" 2,32768,32,8,32
  needs more_torch "PyTorch with CUDA" has_torch || return
  step torch_more 60 "$python" bench/torch_attention.py "${more_shapes[@]}"
}

stage_prefill() {
  program prefill mustafar_cuda_prefill_bench || return
  step prefill 60 "$bin/mustafar_cuda_prefill_bench"
}

stage_linear() {
  program linear mustafar_cuda_linear_bench || return
  step linear 60 "$bin/mustafar_cuda_linear_bench" 0.03
}

stage_torch() {
  needs torch "PyTorch with CUDA" has_torch || return
  step torch 60 "$python" bench/torch_attention.py "${shapes[@]}"
}

# Whole models of random weights, end to end.
stage_model() {
  program model mustafar || return
  local bench=("$bin/mustafar" bench --device cuda --dtype bf16 -r 3 -o md)
  step model_8b 120 "${bench[@]}" --shape llama-3-8b -p 2048 -n 48 -d 0,32768 \
    --kv dense,lossless,balanced,small,mustafar
  step model_8b_int4 90 "${bench[@]}" --shape llama-3-8b -w int4 -p 2048 -n 48 -d 0,32768 \
    --kv dense,lossless,balanced
  step model_8b_int8 90 "${bench[@]}" --shape llama-3-8b -w int8 -p 2048 -n 48 -d 0 --kv lossless
  step model_1b 60 "${bench[@]}" --shape llama-3.2-1b -p 2048 -n 48 -d 0,32768 \
    --kv dense,lossless,balanced,small,mustafar
  step model_1b_int4 60 "${bench[@]}" --shape llama-3.2-1b -w int4 -p 2048 -n 48 -d 0,32768 \
    --kv lossless,balanced
}

# Sequences that decode together: weights are read once for all, caches one by one.
stage_batch() {
  program batch mustafar || return
  local bench=("$bin/mustafar" bench --device cuda --dtype bf16 -r 3 -o md --shape llama-3-8b -p 0
    -n 24 -d 8192)
  step batch_dense 90 "${bench[@]}" -b 1,8,16,32 --kv dense
  step batch 120 "${bench[@]}" -b 1,8,16,32,64 --kv lossless,balanced
  step batch_int4 120 "${bench[@]}" -w int4 -b 1,8,16,32,64 --kv lossless,balanced
}

# The server with many clients and a fixed memory for caches: dense beside compressed ones.
stage_serve() {
  program serve mustafar || return
  needs serve "Python" test -n "$python" || return
  needs serve "the package (tools/gpu_prebuild.sh -w)" test -d "$scratch/server" || return
  local curve=(env "PYTHONPATH=$scratch/server" "PATH=$bin:$PATH" "$python"
    bench/serving_curve.py --tokenizer "$scratch/server/tokenizer.json" --folder "${MUSTAFAR_FAST_FOLDER:-/dev/shm}")
  step serve 280 "${curve[@]}" --shape "${MUSTAFAR_SERVE_SHAPE:-llama-3-8b}" \
    --presets dense lossless balanced --kv-budget "${MUSTAFAR_SERVE_BUDGET:-8G}" \
    --clients "${MUSTAFAR_SERVE_CLIENTS:-64}" --prompt 4096 --output "${MUSTAFAR_SERVE_OUTPUT:-512}" \
    --json "$raw/serve.json" --serve --prefill-tokens 2048
}

# What bounds the kernels, by the hardware's counters.
stage_profile() {
  program profile mustafar_cuda_bench || return
  needs profile ncu command -v ncu || return
  local setting sections=(--section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy
    --section LaunchStats --section WarpStateStats --section SchedulerStats
    --section ComputeWorkloadAnalysis)
  for setting in "dense f16" "dense int8" "f16 37.5" "int8 22.7"; do
    step "ncu_${setting// /_}" 40 ncu --clock-control none -k regex:decode_attention -c 1 \
      "${sections[@]}" "$bin/mustafar_cuda_bench" -s "$setting" 0.01 8,32768,32,8
  done
  step ncu_int4_weights 40 ncu --clock-control none -k regex:gemv_quantised -c 1 "${sections[@]}" \
    "$bin/mustafar_cuda_linear_bench" 0.01 "gate, up"
  step ncu_prefill 40 ncu --clock-control none -k regex:prefill_attention -c 2 "${sections[@]}" \
    "$bin/mustafar_cuda_prefill_bench"
}

# Time of every kernel of two decode steps of two layers of an 8B model.
stage_step() {
  program step mustafar || return
  needs step ncu command -v ncu || return
  step step 60 ncu --clock-control none --metrics gpu__time_duration.sum -c 120 --csv \
    "$bin/mustafar" bench --shape llama-3-8b:2 --device cuda --dtype bf16 -r 1 -p 0 -n 4 -d 4096 \
    --kv lossless
}

stage_sanitize() {
  program sanitize mustafar_cuda_kernel_tests || return
  needs sanitize compute-sanitizer command -v compute-sanitizer || return
  local tool
  for tool in memcheck racecheck synccheck; do
    step $tool 60 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$bin/mustafar_cuda_kernel_tests" "--gtest_filter=${MUSTAFAR_SANITIZE_FILTER:-*128*}"
  done
}

for stage in "${stages[@]}"; do
  declare -F "stage_$stage" > /dev/null || { echo "no stage $stage" >&2; exit 2; }
done
# cuBLASLt as PyTorch brings it, where the loader's own places have none.
if [ -z "${MUSTAFAR_CUBLASLT:-}" ] && [ -n "$python" ]; then
  library=$("$python" -c 'import glob, site, sys
for folder in site.getsitepackages() + sys.path:
    found = glob.glob(folder + "/nvidia/*/lib/libcublasLt.so.*")
    if found:
        print(found[0])
        break' 2> /dev/null)
  [ -n "$library" ] && export MUSTAFAR_CUBLASLT=$library
fi
if [ -n "$dry" ]; then
  for stage in "${stages[@]}"; do "stage_$stage"; done
  exit 0
fi

mkdir -p "$raw" "$out" || exit 2
: > "$raw/stages.txt"
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -1)
{
  cat "$prebuilt/build.txt" 2> /dev/null || echo "build not available"
  echo "gpu ${gpu:-not available}"
  echo "cublaslt ${MUSTAFAR_CUBLASLT:-where the loader finds it}"
} > "$raw/machine.txt"
cp "$prebuilt/sass.md" "$raw/" 2> /dev/null
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
