#include "model/weights.h"

#include <algorithm>
#include <utility>

#include "core/hash.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

// Tensors of one source by name, on their way to the table. Without a backend nothing is copied:
// the bytes that they will take are counted.
class Loader {
 public:
  using Progress = std::function<void(int64_t, int64_t)>;

  explicit Loader(const TensorSource& source) : source_(source) {}
  Loader(const TensorSource& source, Backend& backend, const WeightFormat& format,
         const Progress& progress, int64_t total)
      : source_(source), backend_(&backend), format_(format), progress_(progress), total_(total) {}

  Matrix matrix(const std::string& name, int64_t rows, int64_t cols) {
    return matrix(name, rows, cols, format_);
  }
  // The embedding or the head.
  Matrix vocabulary_matrix(const std::string& name, int64_t rows, int64_t cols) {
    return matrix(name, rows, cols, format_.for_vocabulary());
  }

  const float* vector(const std::string& name, int64_t n) {
    const StoredTensor stored = source_.tensor(name, {n});
    if (backend_ == nullptr) {
      bytes_ += n * 4;
      return nullptr;
    }
    source_.prepare(stored.data, dtype_bytes(stored.dtype, n));
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
    bytes_ += bytes;
    if (backend_ == nullptr) return nullptr;
    owned_.push_back(backend_->allocate(bytes));
    backend_->upload(owned_.back()->data(), values.data(), bytes);
    report(bytes);
    return static_cast<const float*>(owned_.back()->data());
  }

  bool has(const std::string& name) const { return source_.has(name); }
  int64_t bytes() const { return bytes_; }  // of matrices and vectors so far
  std::string fingerprint() const { return hash_.hex(); }
  std::vector<std::unique_ptr<DeviceMemory>> take_owned() { return std::move(owned_); }

 private:
  Matrix matrix(const std::string& name, int64_t rows, int64_t cols, const WeightFormat& format) {
    const StoredTensor stored = source_.tensor(name, {rows, cols});
    const int64_t bytes = dtype_bytes(stored.dtype, rows * cols);
    Matrix matrix{stored.data, stored.dtype, rows, cols};
    if (backend_ == nullptr) {
      bytes_ += bytes;
      return matrix;
    }
    if (!format.as_stored) return quantise(name, matrix, bytes, format);
    bytes_ += bytes;
    if (!backend_->host_memory()) matrix.data = to_device(stored.data, bytes);
    sample(name, stored, bytes);
    return matrix;
  }

  Matrix quantise(const std::string& name, const Matrix& stored, int64_t bytes,
                  const WeightFormat& format) {
    const QuantisedShape shape = format.shape(stored.rows, stored.cols);
    owned_.push_back(backend_->allocate(shape.bytes()));
    bytes_ += shape.bytes();
    source_.prepare(stored.data, bytes);
    if (!backend_->quantise(stored, shape, owned_.back()->data())) {
      throw ModelError("tensor \"" + name + "\" has values that weights \"" + format.name() +
                       "\" can't hold: expected finite ones, in groups whose range fits f16");
    }
    const Matrix quantised = Matrix::of(shape, owned_.back()->data());
    sample(name, {stored.data, stored.dtype}, bytes);
    hash_.add(format.name());
    sample_bytes(quantised.data, shape.scales_at());  // without the padding that follows
    sample_bytes(quantised.scales, dtype_bytes(shape.scale_dtype, shape.n_scales()));
    sample_bytes(quantised.offsets, shape.offset_bytes());
    source_.release(stored.data, bytes);
    report(bytes);
    return quantised;
  }

  void sample(const std::string& name, const StoredTensor& stored, int64_t bytes) {
    hash_.add(name);
    hash_.add_int(static_cast<int64_t>(stored.dtype));
    hash_.add_int(bytes);
    sample_bytes(stored.data, bytes);
  }

  // Up to 16 pieces of 64 bytes, spread over the tensor: reads little of a large file.
  void sample_bytes(const void* data, int64_t bytes) {
    constexpr int64_t kPieces = 16, kPieceBytes = 64;
    for (int64_t i = 0; i < kPieces; i++) {
      const int64_t at = (bytes - std::min(bytes, kPieceBytes)) / (kPieces - 1) * i;
      hash_.add(static_cast<const char*>(data) + at, std::min(bytes, kPieceBytes));
    }
  }

  // In parts, so that progress shows and can stop the upload of a large matrix.
  const void* to_device(const void* host, int64_t bytes) {
    constexpr int64_t kPartBytes = int64_t{64} << 20;
    owned_.push_back(backend_->allocate(bytes));
    uint8_t* const device = static_cast<uint8_t*>(owned_.back()->data());
    const uint8_t* const from = static_cast<const uint8_t*>(host);
    for (int64_t at = 0; at < bytes; at += kPartBytes) {
      const int64_t part = std::min(kPartBytes, bytes - at);
      source_.prepare(from + at, part);
      backend_->upload(device + at, from + at, part);
      report(part);
    }
    return device;
  }

  void report(int64_t bytes) {
    done_ += bytes;
    const bool stay = backend_->host_memory() && format_.as_stored;
    if (progress_ && !stay) progress_(done_, total_);
  }

  const TensorSource& source_;
  Backend* const backend_ = nullptr;
  const WeightFormat format_;
  const Progress progress_;
  const int64_t total_ = 0;
  int64_t bytes_ = 0;
  int64_t done_ = 0;  // of total_
  std::vector<std::unique_ptr<DeviceMemory>> owned_;
  Hash64 hash_;
};

Weights load_table(const ModelConfig& c, Loader& load) {
  Weights w;
  // Tied weights may be stored under either name alone.
  const char* kEmbedding = "model.embed_tokens.weight";
  const char* kHead = "lm_head.weight";
  const bool has_embedding = load.has(kEmbedding), has_head = load.has(kHead);
  w.embedding = load.vocabulary_matrix(has_embedding || !has_head ? kEmbedding : kHead,
                                       c.vocab_size, c.hidden_size);
  w.lm_head = has_embedding && has_head && !c.tie_word_embeddings
                  ? load.vocabulary_matrix(kHead, c.vocab_size, c.hidden_size)
                  : w.embedding;
  w.final_norm = load.vector("model.norm.weight", c.hidden_size);
  w.rope_frequencies = load.floats(c.rope_inverse_frequencies());

  const int64_t q_rows = int64_t{c.n_heads} * c.head_dim;
  const int64_t kv_rows = int64_t{c.n_kv_heads} * c.head_dim;
  for (int32_t i = 0; i < c.n_layers; i++) {
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
  return w;
}

}  // namespace

LoadedWeights load_weights(const ModelConfig& c, const TensorSource& source, Backend& backend,
                           const WeightFormat& format,
                           const std::function<void(int64_t, int64_t)>& progress) {
  int64_t total = 0;
  if (!backend.host_memory() || !format.as_stored) {
    Loader count(source);
    load_table(c, count);
    total = count.bytes();
  }
  if (!backend.host_memory()) {
    const int64_t available = backend.available_bytes();
    if (total > available) {
      throw OutOfMemory("the weights take " + std::to_string(total) + " bytes, device \"" +
                        backend.device() + "\" has " + std::to_string(available) +
                        " free; device \"cpu\" reads them from the file");
    }
  }
  Loader load(source, backend, format, progress, total);
  LoadedWeights loaded;
  loaded.table = load_table(c, load);
  loaded.bytes = load.bytes();
  loaded.fingerprint = load.fingerprint();
  loaded.owned = load.take_owned();
  return loaded;
}

}  // namespace mustafar
