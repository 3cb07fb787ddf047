// The tensors of a Llama checkpoint, by their Hugging Face names, as the backend needs them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "mustafar/model_config.h"

namespace mustafar {

// A tensor in host memory that outlives the model: a mapped file, or memory made for a benchmark.
struct StoredTensor {
  const void* data = nullptr;  // aligned to its element
  DType dtype = DType::kF32;   // f32, f16 or bf16
};

// Where tensors come from. tensor() throws ModelError where the name is missing or the shape
// differs.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual bool has(const std::string& name) const = 0;
  virtual StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const = 0;
};

// The table plus what it owns. Matrices stay where they are when the backend reads host memory;
// vectors (norms, biases) become f32 copies.
struct LoadedWeights {
  Weights table;
  int64_t bytes = 0;        // of matrices and vectors
  std::string fingerprint;  // of names, shapes, types and a sample of every tensor's bytes
  std::vector<std::unique_ptr<DeviceMemory>> owned;
};

// progress: bytes done and in all, while weights are copied to a device.
LoadedWeights load_weights(const ModelConfig& config, const TensorSource& source, Backend& backend,
                           const std::function<void(int64_t, int64_t)>& progress);

// Tensors of a model of this architecture with random normal values (standard deviation 0.02, norms
// 1) in one dtype, reproducible from the seed: for benchmarks and tests without a download.
std::unique_ptr<TensorSource> random_tensors(const ModelConfig& config, DType dtype, uint64_t seed);

}  // namespace mustafar
