#include "model/weights.h"

#include <algorithm>
#include <utility>

#include "core/hash.h"

namespace mustafar {
namespace {

class Loader {
 public:
  Loader(const TensorSource& source, Backend& backend, LoadedWeights& out)
      : source_(source), backend_(backend), out_(out) {}

  Matrix matrix(const std::string& name, int64_t rows, int64_t cols) {
    const StoredTensor stored = source_.tensor(name, {rows, cols});
    const int64_t bytes = dtype_bytes(stored.dtype, rows * cols);
    out_.bytes += bytes;
    sample(name, stored, bytes);
    Matrix matrix{stored.data, stored.dtype, rows, cols};
    if (!backend_.host_memory()) matrix.data = to_device(stored.data, bytes);
    return matrix;
  }

  const float* vector(const std::string& name, int64_t n) {
    const StoredTensor stored = source_.tensor(name, {n});
    sample(name, stored, dtype_bytes(stored.dtype, n));
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; i++) values[i] = load_float(stored.data, stored.dtype, i);
    return floats(values);
  }

  const float* optional_vector(bool present, const std::string& name, int64_t n) {
    return present ? vector(name, n) : nullptr;
  }

  const float* floats(const std::vector<float>& values) {
    const int64_t bytes = static_cast<int64_t>(values.size()) * 4;
    out_.bytes += bytes;
    return static_cast<const float*>(to_device(values.data(), bytes));
  }

  std::string fingerprint() const { return hash_.hex(); }

 private:
  // Up to 16 pieces of 64 bytes, spread over the tensor: reads little of a large file.
  void sample(const std::string& name, const StoredTensor& stored, int64_t bytes) {
    hash_.add(name);
    hash_.add_int(static_cast<int64_t>(stored.dtype));
    hash_.add_int(bytes);
    constexpr int64_t kPieces = 16, kPieceBytes = 64;
    for (int64_t i = 0; i < kPieces; i++) {
      const int64_t at = (bytes - std::min(bytes, kPieceBytes)) / (kPieces - 1) * i;
      hash_.add(static_cast<const char*>(stored.data) + at, std::min(bytes, kPieceBytes));
    }
  }

  const void* to_device(const void* host, int64_t bytes) {
    out_.owned.push_back(backend_.allocate(bytes));
    void* device = out_.owned.back()->data();
    backend_.upload(device, host, bytes);
    return device;
  }

  const TensorSource& source_;
  Backend& backend_;
  LoadedWeights& out_;
  Hash64 hash_;
};

}  // namespace

LoadedWeights load_weights(const ModelConfig& c, const TensorSource& source, Backend& backend,
                           const std::function<void(int64_t, int64_t)>& progress) {
  LoadedWeights loaded;
  Loader load(source, backend, loaded);
  Weights& w = loaded.table;
  const int64_t steps = c.n_layers + 1;

  // Tied weights may be stored under either name alone.
  const char* kEmbedding = "model.embed_tokens.weight";
  const char* kHead = "lm_head.weight";
  const bool has_embedding = source.has(kEmbedding), has_head = source.has(kHead);
  w.embedding =
      load.matrix(has_embedding || !has_head ? kEmbedding : kHead, c.vocab_size, c.hidden_size);
  w.lm_head = has_embedding && has_head && !c.tie_word_embeddings
                  ? load.matrix(kHead, c.vocab_size, c.hidden_size)
                  : w.embedding;
  w.final_norm = load.vector("model.norm.weight", c.hidden_size);
  w.rope_frequencies = load.floats(c.rope_inverse_frequencies());

  const int64_t q_rows = int64_t{c.n_heads} * c.head_dim;
  const int64_t kv_rows = int64_t{c.n_kv_heads} * c.head_dim;
  for (int32_t i = 0; i < c.n_layers; i++) {
    if (progress) progress(i + 1, steps);
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const std::string attention = layer + "self_attn.", mlp = layer + "mlp.";
    LayerWeights l;
    l.attention_norm = load.vector(layer + "input_layernorm.weight", c.hidden_size);
    l.q = load.matrix(attention + "q_proj.weight", q_rows, c.hidden_size);
    l.k = load.matrix(attention + "k_proj.weight", kv_rows, c.hidden_size);
    l.v = load.matrix(attention + "v_proj.weight", kv_rows, c.hidden_size);
    l.o = load.matrix(attention + "o_proj.weight", c.hidden_size, q_rows);
    l.q_bias = load.optional_vector(c.qkv_bias, attention + "q_proj.bias", q_rows);
    l.k_bias = load.optional_vector(c.qkv_bias, attention + "k_proj.bias", kv_rows);
    l.v_bias = load.optional_vector(c.qkv_bias, attention + "v_proj.bias", kv_rows);
    l.o_bias = load.optional_vector(c.o_bias, attention + "o_proj.bias", c.hidden_size);
    l.mlp_norm = load.vector(layer + "post_attention_layernorm.weight", c.hidden_size);
    l.gate = load.matrix(mlp + "gate_proj.weight", c.intermediate_size, c.hidden_size);
    l.up = load.matrix(mlp + "up_proj.weight", c.intermediate_size, c.hidden_size);
    l.down = load.matrix(mlp + "down_proj.weight", c.hidden_size, c.intermediate_size);
    l.gate_bias = load.optional_vector(c.mlp_bias, mlp + "gate_proj.bias", c.intermediate_size);
    l.up_bias = load.optional_vector(c.mlp_bias, mlp + "up_proj.bias", c.intermediate_size);
    l.down_bias = load.optional_vector(c.mlp_bias, mlp + "down_proj.bias", c.hidden_size);
    w.layers.push_back(l);
  }
  if (progress) progress(steps, steps);
  loaded.fingerprint = load.fingerprint();
  return loaded;
}

}  // namespace mustafar
