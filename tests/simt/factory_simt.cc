// The factory of this test program: device "cuda" is the CUDA backend on the harness. Being linked
// directly, it takes the place of the library's.
#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "cuda/cuda_backend.h"

namespace mustafar {

std::unique_ptr<Backend> make_backend(const ModelConfig& config, const BackendOptions& options) {
  if (options.device == "cuda") return cuda::make_cuda_backend(config, options.dtype);
  return std::make_unique<CpuBackend>(config, options.dtype, options.threads, detect_isa());
}

}  // namespace mustafar
