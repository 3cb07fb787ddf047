// The factory of this test program: devices "cuda" and "cuda:1" are the CUDA backend on the
// harness. Being linked directly, it takes the place of the library's.
#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/device_name.h"
#include "cuda/cuda_backend.h"

namespace mustafar {

std::unique_ptr<Backend> make_backend(const ModelConfig& config, const BackendOptions& options) {
  const DeviceName device = DeviceName::parse(options.device);
  if (device.kind == DeviceName::Kind::kCuda) {
    return cuda::make_cuda_backend(config, options.dtype, device.number);
  }
  return std::make_unique<CpuBackend>(config, options.dtype, options.threads, detect_isa());
}

}  // namespace mustafar
