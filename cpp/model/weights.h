// The tensors of a Llama checkpoint, by their Hugging Face names, as the backend needs them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "io/quantised/stored_matrix.h"
#include "model/weight_format.h"
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
  // The quantised matrix that stands in the place of the tensor of this name, or null.
  virtual const StoredMatrix* quantised(const std::string& name) const {
    (void)name;
    return nullptr;
  }
  // Whether there is a quantised matrix of which that is true.
  virtual bool any_quantised(const std::function<bool(const StoredMatrix&)>& test) const {
    (void)test;
    return false;
  }
  // Makes sure that bytes of a tensor can be read, as those of a file that shrank can't be. Throws
  // ModelError.
  virtual void prepare(const void* data, int64_t bytes) const { (void)data, (void)bytes; }
  // Throws ModelError where what was read of tensors may not have been theirs: a file has lost
  // bytes meanwhile.
  virtual void check_read() const {}
  // Bytes of a tensor that will hardly be read again need not stay in memory.
  virtual void release(const void* data, int64_t bytes) const { (void)data, (void)bytes; }
  // Reads everything, where it isn't in memory yet. progress: bytes done, bytes in all.
  virtual void read_all(const std::function<void(int64_t, int64_t)>& progress) const {
    (void)progress;
  }
};

// The table plus what it owns. Matrices stay where they are when the backend reads host memory,
// unless they are quantised, on loading or in the source (model/stored_weights.h); vectors (norms,
// biases) become f32 copies.
struct LoadedWeights {
  Weights table;
  int64_t bytes = 0;        // of matrices and vectors as the device has them
  std::string fingerprint;  // of names, shapes, types and a sample of every tensor's bytes; the
                            // same on every device
  std::vector<std::unique_ptr<DeviceMemory>> owned;
};

// format: what the backend's matrices are to be. One matrix at a time is read from the source and
// let go. The host quantises and unpacks; for a device with memory of its own it does so in a copy
// that goes up as one allocation. progress: bytes of the source done and in all, while weights are
// copied to a device, quantised or unpacked. Throws OutOfMemory, before anything is copied, where
// what they take on the device is more than it has free, and ModelError naming a matrix whose
// values can't be quantised.
LoadedWeights load_weights(const ModelConfig& config, const TensorSource& source, Backend& backend,
                           const WeightFormat& format,
                           const std::function<void(int64_t, int64_t)>& progress);

// Tensors of a model of this architecture with random normal values (standard deviation 0.02, norms
// 1) in one dtype, reproducible from the seed: for benchmarks and tests without a download.
std::unique_ptr<TensorSource> random_tensors(const ModelConfig& config, DType dtype, uint64_t seed);

}  // namespace mustafar
