#!/bin/bash
# Every test, from a fresh clone: installs what is missing (system packages only as root), builds the
# wheel, the C++ tests and their ASan + UBSan build, and runs ctest, pytest, ruff and mypy.
# Uses ccache where it is installed. CUDA is built where a GPU is at hand, or with MUSTAFAR_CUDA=ON.
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

cuda=${MUSTAFAR_CUDA:-$(nvidia-smi >/dev/null 2>&1 && echo AUTO || echo OFF)}
launcher=$(command -v ccache || true)
export CMAKE_CXX_COMPILER_LAUNCHER=$launcher CMAKE_CUDA_COMPILER_LAUNCHER=$launcher
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "wheel and test tools"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check "-Ccmake.define.MUSTAFAR_CUDA=$cuda" '.[test]'

failed=()
for preset in cpu-release cpu-debug; do
  step "C++ tests: $preset"
  cmake --preset "$preset" -DMUSTAFAR_BUILD_PYTHON=OFF >/dev/null
  cmake --build --preset "$preset" -- --quiet
  ctest --preset "$preset" -j "$(nproc)" --progress || failed+=("ctest $preset")
done

step "pytest"
PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m pytest || failed+=(pytest)
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
