#!/usr/bin/env bash
# Builds what tools/gpu_check.sh runs on a machine that has a GPU but neither a compiler nor our
# libraries: programs for one architecture with everything but the driver and cuBLASLt linked in, the
# checkpoints of the trained tests, and what only the compiler can say (instruction counts).
#
#   tools/gpu_prebuild.sh [-o folder] [-a arch] [-j jobs] [-w python]   folder: .gpu, arch: 90a
#
# The folder is made anew; about 12 MiB. -w: a Python of the version that the other machine has, with
# pybind11: the package is built for it and packed with what the server needs (another 10 MiB).
# CMAKE_ARGS: further arguments of CMake. Needs xz.
set -euo pipefail
cd "$(dirname "$0")/.."

out=.gpu arch=90a jobs=$(nproc) wheel_python=''
while getopts "o:a:j:w:" option; do
  case $option in
    o) out=$OPTARG ;;
    a) arch=$OPTARG ;;
    j) jobs=$OPTARG ;;
    w) wheel_python=$OPTARG ;;
    *) exit 2 ;;
  esac
done
build=build/gpu-prebuild
options=(-DCMAKE_BUILD_TYPE=Release -DMUSTAFAR_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$arch"
  -DMUSTAFAR_BUILD_TESTS=ON -DMUSTAFAR_BUILD_CLI=ON -DMUSTAFAR_WERROR=ON
  "-DCMAKE_EXE_LINKER_FLAGS=-static-libstdc++ -static-libgcc -s"
  "-DCMAKE_MODULE_LINKER_FLAGS=-static-libstdc++ -static-libgcc -s")
if [ -n "$wheel_python" ]; then
  options+=(-DMUSTAFAR_BUILD_PYTHON=ON "-DPython_EXECUTABLE=$wheel_python")
else
  options+=(-DMUSTAFAR_BUILD_PYTHON=OFF)
fi
if command -v ccache > /dev/null; then
  options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
fi
# shellcheck disable=SC2086  # CMAKE_ARGS is a list
cmake -S . -B $build -G Ninja "${options[@]}" ${CMAKE_ARGS:-} > /dev/null
programs=(cpp/mustafar tests/mustafar_tests tests/cuda/mustafar_cuda_kernel_tests
  bench/mustafar_cuda_bench bench/mustafar_cuda_prefill_bench bench/mustafar_cuda_linear_bench)
targets=(mustafar_command "${programs[@]:1}")
if [ -n "$wheel_python" ]; then targets+=(_core); fi
cmake --build $build -j "$jobs" --target "${targets[@]##*/}"

rm -rf "$out" $build/bin
mkdir -p $build/bin
mkdir -p "$out/shared/data/models"
for program in "${programs[@]}"; do ln -f "$build/$program" "$build/bin/"; done
# The programs share most of their kernels: a dictionary longer than a program finds that.
tar -cf - -C "$build" bin | xz -9 > "$out/bin.tar.xz"
for model in ../shared/data/models/story ../shared/data/models/stories260K; do
  if [ -d "$model" ]; then cp -rL "$model" "$out/shared/data/models/"; fi
done
if command -v cuobjdump > /dev/null; then
  mapfile -t objects < <(find $build/cuda -name 'decode_attention_*.o')
  python3 tools/sass_count.py "${objects[@]}" --markdown "$out/sass.md" > /dev/null
else
  echo "no cuobjdump: instructions are not counted"
fi
if [ -n "$wheel_python" ]; then
  server=$build/server
  rm -rf "$server" && mkdir -p "$server"
  "$wheel_python" -m pip install -q --no-deps --no-compile --target "$server" \
    anyio==4.16.0 h11==0.16.0 starlette==1.10.0 uvicorn==0.54.0
  cp -rL $build/python/mustafar "$server/"
  rm -rf "$server/mustafar/models"  # of the tree that is carried along
  strip --strip-unneeded "$server"/mustafar/_core.*.so
  cp ../shared/data/tokenizers/llama-3/tokenizer.json "$server/"
  tar -cf - -C "$build" server | xz -3 -T "$jobs" > "$out/server.tar.xz"
fi
version=$(nvcc --version | sed -n 's/^Cuda compilation tools, //p')
dirty=$(git status --porcelain --untracked-files=no | head -1)
{
  echo "commit $(git rev-parse HEAD)${dirty:+ with changes}"
  echo "cuda_hash $(cat cuda/*.cu cuda/*.cuh cuda/*.cc cuda/*.h | sha256sum | cut -c1-16)"
  echo "nvcc $version"
  echo "architecture sm_$arch"
} > "$out/build.txt"
du -sh "$out"
cat "$out/build.txt"
