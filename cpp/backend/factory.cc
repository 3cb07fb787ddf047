// The choice of a backend.
#include <stdexcept>
#include <string>

#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "mustafar/error.h"
#if defined(MUSTAFAR_WITH_CUDA)
#include "cuda/cuda_backend.h"
#endif

namespace mustafar {

std::string missing_on_cuda(const ModelConfig& config) {
  const FamilyTraits& traits = config.traits;
  if (traits.qk_norm != QkNorm::kNone) return "norms of queries and keys";
  if (traits.norm_after) return "norms after attention and MLP";
  for (int32_t i = 0; i < config.n_layers; i++) {
    if (!traits.rotates(i)) return "layers without RoPE";
  }
  if (config.rope_dims() != config.head_dim) return "RoPE of a part of each head";
  if (config.has_long_rope()) return "longrope";
  if (config.rope_attention_factor != 1) return "RoPE that scales (yarn's attention factor)";
  if (traits.attention_multiplier != 0) return "an attention multiplier";
  if (traits.residual_multiplier != 1) return "a residual multiplier";
  if (traits.embedding_multiplier != 1) return "an embedding multiplier";
  return "";
}

namespace {

// Throws DeviceError saying what is missing.
std::unique_ptr<Backend> make_gpu_backend(const ModelConfig& config,
                                          const BackendOptions& options) {
  if (const std::string missing = missing_on_cuda(config); !missing.empty()) {
    throw DeviceError("device \"cuda\" has no kernels yet for " + missing + ", which this " +
                      config.model_type + " model needs: use the device cpu");
  }
#if defined(MUSTAFAR_WITH_CUDA)
  return cuda::make_cuda_backend(config, options.dtype);
#else
  (void)config, (void)options;
  throw DeviceError(
      "device \"cuda\": this build has no CUDA; rebuild with MUSTAFAR_CUDA=ON and nvcc on PATH");
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
  if (options.device == "cuda") return make_gpu_backend(config, options);
  if (options.device != "auto" && options.device != "cpu") {
    throw std::invalid_argument("device: expected auto, cpu or cuda, got \"" + options.device +
                                "\"");
  }
  if (options.device == "auto") {
    try {
      return make_gpu_backend(config, options);
    } catch (const DeviceError&) {  // no GPU to be had: the CPU
    }
  }
  return std::make_unique<CpuBackend>(config, options.dtype, options.threads, detect_isa());
}

}  // namespace mustafar
