#include <cmath>
#include <map>
#include <mutex>

#include "core/buffer.h"
#include "model/weights.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

// splitmix64 (Steele, Lea, Flood 2014): one multiply-mix step per value is plenty for weights.
uint64_t mix(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The sum of four uniforms, scaled to standard deviation 1: near enough to normal, and quick.
float roughly_normal(uint64_t bits) {
  const int32_t sum = static_cast<int32_t>((bits & 0xffff) + (bits >> 16 & 0xffff) +
                                           (bits >> 32 & 0xffff) + (bits >> 48)) -
                      131070;
  return static_cast<float>(sum) * (1.7320508f / 65536.0f);
}

class RandomTensors : public TensorSource {
 public:
  RandomTensors(const ModelConfig& config, DType dtype, uint64_t seed)
      : tied_(config.tie_word_embeddings), dtype_(dtype), seed_(seed) {}

  bool has(const std::string& name) const override { return name != "lm_head.weight" || !tied_; }

  StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    std::lock_guard lock(mutex_);
    auto [entry, is_new] = buffers_.try_emplace(name);
    if (is_new) fill(name, shape, entry->second);
    return {entry->second.data(), dtype_};
  }

 private:
  void fill(const std::string& name, const std::vector<int64_t>& shape, HostBuffer& buffer) const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    buffer = HostBuffer(dtype_bytes(dtype_, n));
    const bool norm = name.find("norm") != std::string::npos;
    uint64_t state = seed_;
    for (char c : name) state = (state ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
    for (int64_t i = 0; i < n; i++) {
      store_float(buffer.data(), dtype_, i, norm ? 1.0f : 0.02f * roughly_normal(mix(state)));
    }
  }

  const bool tied_;
  const DType dtype_;
  const uint64_t seed_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, HostBuffer> buffers_;
};

}  // namespace

std::unique_ptr<TensorSource> random_tensors(const ModelConfig& config, DType dtype,
                                             uint64_t seed) {
  if (!is_float(dtype)) throw ModelError("random weights need a float dtype");
  return std::make_unique<RandomTensors>(config, dtype, seed);
}

}  // namespace mustafar
