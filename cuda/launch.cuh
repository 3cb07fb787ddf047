// One way to start a kernel: checked under nvcc, on the harness where MUSTAFAR_SIMT is defined.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/device_ops.cuh"
#include "mustafar/error.h"

namespace mustafar::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// Starts kernel<<<grid, threads, shared_bytes, stream>>>(arguments...). An empty grid starts
// nothing. Throws Error naming the kernel.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            int64_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  // CUDA's limits.
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    throw Error(std::string("kernel ") + name + ": a grid of " + std::to_string(grid.x) + " x " +
                std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks is too large");
  }
#if defined(MUSTAFAR_SIMT)
  (void)name;
  (void)stream;
  const simt::Dim3 blocks{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                          static_cast<unsigned>(grid.z)};
  simt::launch(blocks, {static_cast<unsigned>(threads)}, static_cast<size_t>(shared_bytes),
               [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  if (shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                        static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
#if defined(MUSTAFAR_CUDA_DEBUG)
  synchronize_unless_capturing(stream, name);
#endif
#endif
}

}  // namespace mustafar::cuda
