// The choice of a backend.
#include <stdexcept>
#include <string>

#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/device_name.h"
#include "mustafar/error.h"
#if defined(MUSTAFAR_WITH_CUDA)
#include "cuda/cuda_backend.h"
#endif

namespace mustafar {

namespace {

// Throws DeviceError saying what is missing.
std::unique_ptr<Backend> make_gpu_backend(const ModelConfig& config, const DeviceName& device,
                                          DType dtype) {
#if defined(MUSTAFAR_WITH_CUDA)
  return cuda::make_cuda_backend(config, dtype, device.number);
#else
  (void)config, (void)dtype;
  throw DeviceError("device \"" + device.text() +
                    "\": this build has no CUDA; rebuild with MUSTAFAR_CUDA=ON and nvcc on PATH");
#endif
}

}  // namespace

std::unique_ptr<Backend> make_backend(const ModelConfig& config, const BackendOptions& options) {
  if (!is_float(options.dtype)) {
    throw std::invalid_argument(std::string("dtype: expected f32, f16 or bf16, got ") +
                                dtype_name(options.dtype));
  }
  if (options.threads < 0) {
    throw std::invalid_argument("threads: expected 0 (the default) or more, got " +
                                std::to_string(options.threads));
  }
  const DeviceName device = DeviceName::parse(options.device);
  if (device.kind == DeviceName::Kind::kCuda) {
    return make_gpu_backend(config, device, options.dtype);
  }
  if (device.kind == DeviceName::Kind::kAuto) {
    try {
      return make_gpu_backend(config, {DeviceName::Kind::kCuda}, options.dtype);
    } catch (const DeviceError&) {  // no GPU to be had: the CPU
    }
  }
  return std::make_unique<CpuBackend>(config, options.dtype, options.threads, detect_isa());
}

}  // namespace mustafar
