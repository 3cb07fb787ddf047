#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <utility>

#include "backend/cpu/isa.h"
#include "backend/cpu/linear/quantise_matrix.h"
#include "core/buffer.h"
#include "core/hash.h"
#include "core/thread_pool.h"
#include "model/stored_weights.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

// Tensors of one source by name, on their way to the table. Without a backend nothing is copied:
// the bytes that they will take are counted, and those that will be read.
class Loader {
 public:
  using Progress = std::function<void(int64_t, int64_t)>;

  Loader(const TensorSource& source, const WeightFormat& format)
      : source_(source), format_(format) {}
  Loader(const TensorSource& source, const WeightFormat& format, Backend& backend,
         const Progress& progress, int64_t total)
      : source_(source), format_(format), backend_(&backend), progress_(progress), total_(total) {}

  Matrix matrix(const std::string& name, int64_t rows, int64_t cols) {
    return matrix(name, {0, rows, rows}, cols, format_);
  }
  // Rows of a tensor that holds several matrices; nothing is copied that the whole would not be.
  struct Rows {
    int64_t first = 0, count = 0;
    int64_t in_all = 0;
  };
  Matrix matrix(const std::string& name, const Rows& rows, int64_t cols) {
    return matrix(name, rows, cols, format_);
  }
  // The embedding or the head.
  Matrix vocabulary_matrix(const std::string& name, int64_t rows, int64_t cols) {
    return matrix(name, {0, rows, rows}, cols, format_.for_vocabulary());
  }

  const float* vector(const std::string& name, int64_t n, float factor = 1.0f) {
    const StoredTensor stored = source_.tensor(name, {n});
    if (backend_ == nullptr) {
      count(n * 4, n * 4);
      return nullptr;
    }
    source_.prepare(stored.data, dtype_bytes(stored.dtype, n));
    sample(name, stored, dtype_bytes(stored.dtype, n));
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; i++) values[i] = load_float(stored.data, stored.dtype, i) * factor;
    return floats(values);
  }

  const float* optional_vector(bool present, const std::string& name, int64_t n) {
    return present ? vector(name, n) : nullptr;
  }

  const float* floats(const std::vector<float>& values) {
    const int64_t bytes = static_cast<int64_t>(values.size()) * 4;
    if (backend_ == nullptr) {
      count(bytes, bytes);
      return nullptr;
    }
    bytes_ += bytes;
    owned_.push_back(backend_->allocate(bytes));
    backend_->upload(owned_.back()->data(), values.data(), bytes);
    report(bytes);
    return static_cast<const float*>(owned_.back()->data());
  }

  bool has(const std::string& name) const { return source_.has(name); }
  int64_t bytes() const { return bytes_; }      // of matrices and vectors so far, on the device
  int64_t read_bytes() const { return done_; }  // of the source, for them
  std::string fingerprint() const { return hash_.hex(); }
  std::vector<std::unique_ptr<DeviceMemory>> take_owned() { return std::move(owned_); }

 private:
  Matrix matrix(const std::string& name, const Rows& rows, int64_t cols,
                const WeightFormat& format) {
    if (const StoredMatrix* packed = source_.quantised(name)) {
      return unpack(name, *packed, rows, format);
    }
    StoredTensor stored = source_.tensor(name, {rows.in_all, cols});
    stored.data =
        static_cast<const uint8_t*>(stored.data) + dtype_bytes(stored.dtype, rows.first * cols);
    const int64_t bytes = dtype_bytes(stored.dtype, rows.count * cols);
    Matrix matrix{stored.data, stored.dtype, rows.count, cols};
    if (backend_ == nullptr) {
      count(format.as_stored ? bytes : format.shape(matrix.rows, cols).bytes(), bytes);
      return matrix;
    }
    if (!format.as_stored) return quantise(name, matrix, bytes, format);
    bytes_ += bytes;
    if (!backend_->host_memory()) matrix.data = to_device(stored.data, bytes, bytes);
    sample(name, stored, bytes);
    if (backend_->host_memory()) report(bytes);
    return matrix;
  }

  // A quantised matrix of the source.
  Matrix unpack(const std::string& name, const StoredMatrix& stored, const Rows& rows,
                const WeightFormat& format) {
    const bool codes = keeps_codes(stored);
    const QuantisedShape shape = code_shape(stored, rows.count);
    const int64_t bytes =
        codes ? shape.bytes() : dtype_bytes(stored.expanded, rows.count * stored.cols);
    if (backend_ == nullptr) {
      const bool rounds = !codes && !format.as_stored;
      count(rounds ? format.shape(rows.count, stored.cols).bytes() : bytes, bytes);
      return {};
    }
    for (const StoredPart& part : stored.parts) source_.prepare(part.data, part.bytes);
    Matrix matrix;
    if (codes) {
      void* const made = make(bytes);
      unpack_codes(stored, rows.first, shape, &pool(), made);
      hash_.add(name);
      hash_.add(stored.description());
      sample_codes(Matrix::of(shape, made));
      matrix = Matrix::of(shape, finish(made, bytes, bytes));
    } else {
      matrix = expanded(name, stored, rows, bytes, format);
    }
    for (const StoredPart& part : stored.parts) source_.release(part.data, part.bytes);
    return matrix;
  }

  // One whose codes can't be used, as values of `bytes` bytes.
  Matrix expanded(const std::string& name, const StoredMatrix& stored, const Rows& rows,
                  int64_t bytes, const WeightFormat& format) {
    Matrix matrix{nullptr, stored.expanded, rows.count, stored.cols};
    HostBuffer values;  // to be rounded
    void* const made = format.as_stored ? make(bytes) : grown(values, bytes);
    expand(stored, rows.first, rows.count, &pool(), made);
    matrix.data = made;
    if (!format.as_stored) return quantise(name, matrix, bytes, format);
    sample(name, {made, matrix.dtype}, bytes);
    matrix.data = finish(made, bytes, bytes);
    return matrix;
  }

  Matrix quantise(const std::string& name, const Matrix& stored, int64_t bytes,
                  const WeightFormat& format) {
    const QuantisedShape shape = format.shape(stored.rows, stored.cols);
    void* const made = make(shape.bytes());
    source_.prepare(stored.data, bytes);
    if (!quantise_matrix(stored, shape, detect_isa(), pool(), made)) {
      throw ModelError("tensor \"" + name + "\" has values that weights \"" + format.name() +
                       "\" can't hold: expected finite ones, in groups whose range fits f16");
    }
    sample(name, {stored.data, stored.dtype}, bytes);
    hash_.add(format.name());
    sample_codes(Matrix::of(shape, made));
    source_.release(stored.data, bytes);
    return Matrix::of(shape, finish(made, shape.bytes(), bytes));
  }

  // The threads that quantise and unpack: the backend's, or where it has none of the host's, ours.
  ThreadPool& pool() {
    if (ThreadPool* const pool = backend_->host_pool()) return *pool;
    return own_pool_ ? *own_pool_ : own_pool_.emplace(0);
  }

  // Memory for a matrix that is made here: the device's where the host can write it, else that of
  // the copy which finish() takes up. `bytes` are the device's.
  void* make(int64_t bytes) {
    bytes_ += bytes;
    if (!backend_->host_memory()) return grown(copy_, bytes);
    owned_.push_back(backend_->allocate(bytes));
    return owned_.back()->data();
  }

  // What was made, as the device has it. read: bytes of the source that went into it.
  const void* finish(const void* made, int64_t bytes, int64_t read) {
    if (!backend_->host_memory()) return to_device(made, bytes, read);
    report(read);
    return made;
  }

  static void* grown(HostBuffer& buffer, int64_t bytes) {
    try {
      buffer.ensure(static_cast<size_t>(bytes));
    } catch (const std::bad_alloc&) {
      throw OutOfMemory("can't allocate " + std::to_string(bytes) +
                        " bytes of host memory to make a weight matrix in");
    }
    return buffer.data();
  }

  void sample(const std::string& name, const StoredTensor& stored, int64_t bytes) {
    hash_.add(name);
    hash_.add_int(static_cast<int64_t>(stored.dtype));
    hash_.add_int(bytes);
    sample_bytes(stored.data, bytes);
  }

  // Without the padding that follows the scales.
  void sample_codes(const Matrix& quantised) {
    const QuantisedShape shape = quantised.shape();
    sample_bytes(quantised.data, shape.scales_at());
    sample_bytes(quantised.scales, dtype_bytes(shape.scale_dtype, shape.n_scales()));
    sample_bytes(quantised.offsets, shape.offset_bytes());
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
  // read: bytes of the source that these stand for.
  const void* to_device(const void* host, int64_t bytes, int64_t read) {
    constexpr int64_t kPartBytes = int64_t{64} << 20;
    owned_.push_back(backend_->allocate(bytes));
    uint8_t* const device = static_cast<uint8_t*>(owned_.back()->data());
    const uint8_t* const from = static_cast<const uint8_t*>(host);
    const int64_t n_parts = (bytes + kPartBytes - 1) / kPartBytes;
    for (int64_t i = 0; i < n_parts; i++) {
      const int64_t at = i * kPartBytes, part = std::min(kPartBytes, bytes - at);
      source_.prepare(from + at, part);
      backend_->upload(device + at, from + at, part);
      report(read * (i + 1) / n_parts - read * i / n_parts);
    }
    return device;
  }

  void report(int64_t read) {
    done_ += read;
    if (progress_ && total_ > 0) progress_(done_, total_);
  }

  // Instead of loading.
  void count(int64_t on_device, int64_t read) {
    bytes_ += on_device;
    done_ += read;
  }

  const TensorSource& source_;
  const WeightFormat format_;
  Backend* const backend_ = nullptr;
  const Progress progress_;
  const int64_t total_ = 0;
  int64_t bytes_ = 0;
  int64_t done_ = 0;                    // of total_
  std::optional<ThreadPool> own_pool_;  // made when it is needed
  HostBuffer copy_;                     // of one matrix on its way to the device
  std::vector<std::unique_ptr<DeviceMemory>> owned_;
  Hash64 hash_;
};

void load_attention(const ModelConfig& c, const std::string& name, Loader& load, LayerWeights& l) {
  const int64_t hidden = c.hidden_size;
  const int64_t q_rows = int64_t{c.n_heads} * c.head_dim;
  const int64_t kv_rows = int64_t{c.n_kv_heads} * c.head_dim;
  if (c.traits.fused_projections) {
    const std::string fused = name + "qkv_proj.weight";
    const int64_t in_all = q_rows + 2 * kv_rows;
    l.q = load.matrix(fused, {0, q_rows, in_all}, hidden);
    l.k = load.matrix(fused, {q_rows, kv_rows, in_all}, hidden);
    l.v = load.matrix(fused, {q_rows + kv_rows, kv_rows, in_all}, hidden);
  } else {
    l.q = load.matrix(name + "q_proj.weight", q_rows, hidden);
    l.k = load.matrix(name + "k_proj.weight", kv_rows, hidden);
    l.v = load.matrix(name + "v_proj.weight", kv_rows, hidden);
  }
  l.o = load.matrix(name + "o_proj.weight", hidden, q_rows);
  l.q_bias = load.optional_vector(c.qkv_bias, name + "q_proj.bias", q_rows);
  l.k_bias = load.optional_vector(c.qkv_bias, name + "k_proj.bias", kv_rows);
  l.v_bias = load.optional_vector(c.qkv_bias, name + "v_proj.bias", kv_rows);
  l.o_bias = load.optional_vector(c.o_bias, name + "o_proj.bias", hidden);
  const bool normed = c.traits.qk_norm != QkNorm::kNone;
  const bool whole = c.traits.qk_norm == QkNorm::kProjection;
  l.q_norm = load.optional_vector(normed, name + "q_norm.weight", whole ? q_rows : c.head_dim);
  l.k_norm = load.optional_vector(normed, name + "k_norm.weight", whole ? kv_rows : c.head_dim);
}

void load_mlp(const ModelConfig& c, const std::string& name, Loader& load, LayerWeights& l) {
  const int64_t hidden = c.hidden_size, inner = c.intermediate_size;
  if (c.traits.fused_projections) {
    l.gate = load.matrix(name + "gate_up_proj.weight", {0, inner, 2 * inner}, hidden);
    l.up = load.matrix(name + "gate_up_proj.weight", {inner, inner, 2 * inner}, hidden);
  } else {
    l.gate = load.matrix(name + "gate_proj.weight", inner, hidden);
    l.up = load.matrix(name + "up_proj.weight", inner, hidden);
  }
  l.down = load.matrix(name + "down_proj.weight", hidden, inner);
  l.gate_bias = load.optional_vector(c.mlp_bias, name + "gate_proj.bias", inner);
  l.up_bias = load.optional_vector(c.mlp_bias, name + "up_proj.bias", inner);
  l.down_bias = load.optional_vector(c.mlp_bias, name + "down_proj.bias", hidden);
}

Weights load_table(const ModelConfig& c, Loader& load) {
  Weights w;
  const FamilyTraits& traits = c.traits;
  // Tied weights may be stored under either name alone.
  const char* kEmbedding = "model.embed_tokens.weight";
  const char* kHead = "lm_head.weight";
  const bool has_embedding = load.has(kEmbedding), has_head = load.has(kHead);
  w.embedding = load.vocabulary_matrix(has_embedding || !has_head ? kEmbedding : kHead,
                                       c.vocab_size, c.hidden_size);
  w.lm_head = has_embedding && has_head && !c.tie_word_embeddings
                  ? load.vocabulary_matrix(kHead, c.vocab_size, c.hidden_size)
                  : w.embedding;
  w.final_norm = load.vector("model.norm.weight", c.hidden_size,
                             static_cast<float>(1.0 / traits.logits_scaling));
  w.rope_frequencies = load.floats(c.rope_inverse_frequencies());
  if (c.has_long_rope()) w.long_rope_frequencies = load.floats(c.rope_inverse_frequencies(true));
  w.rope_scale = static_cast<float>(c.rope_attention_factor);
  w.embedding_scale = static_cast<float>(traits.embedding_multiplier / traits.residual_multiplier);
  if (traits.attention_multiplier != 0) {  // the backend's own is 1 / sqrt(head_dim)
    w.query_scale = static_cast<float>(traits.attention_multiplier * std::sqrt(c.head_dim));
  }
  w.qk_norm = traits.qk_norm;

  for (int32_t i = 0; i < c.n_layers; i++) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    LayerWeights l;
    l.rotates = traits.rotates(i);
    if (traits.norm_after) {
      l.attention_out_norm = load.vector(layer + "post_attention_layernorm.weight", c.hidden_size);
      l.mlp_out_norm = load.vector(layer + "post_feedforward_layernorm.weight", c.hidden_size);
    } else {
      l.attention_norm = load.vector(layer + "input_layernorm.weight", c.hidden_size);
    }
    load_attention(c, layer + "self_attn.", load, l);
    if (!traits.norm_after) {  // in the order of older fingerprints
      l.mlp_norm = load.vector(layer + "post_attention_layernorm.weight", c.hidden_size);
    }
    load_mlp(c, layer + "mlp.", load, l);
    w.layers.push_back(l);
  }
  return w;
}

void check_room(int64_t bytes, const Backend& backend, bool in_place_on_cpu) {
  const int64_t available = backend.available_bytes();
  if (bytes <= available) return;
  throw OutOfMemory("the weights take " + std::to_string(bytes) + " bytes, device \"" +
                    backend.device() + "\" has " + std::to_string(available) +
                    " free; device \"cpu\" " +
                    (in_place_on_cpu ? "reads them from the file" : "keeps them in host memory"));
}

}  // namespace

LoadedWeights load_weights(const ModelConfig& c, const TensorSource& source, Backend& backend,
                           const WeightFormat& format,
                           const std::function<void(int64_t, int64_t)>& progress) {
  const bool unpacks = source.any_quantised([](const StoredMatrix&) { return true; });
  const bool in_place = format.as_stored && !unpacks;  // where the host's memory is the device's
  int64_t total = 0;
  if (!backend.host_memory() || !in_place) {
    Loader count(source, format);
    load_table(c, count);
    total = count.read_bytes();
    if (!backend.host_memory()) check_room(count.bytes(), backend, in_place);
  }
  Loader load(source, format, backend, progress, total);
  LoadedWeights loaded;
  loaded.table = load_table(c, load);
  loaded.bytes = load.bytes();
  loaded.fingerprint = load.fingerprint();
  loaded.owned = load.take_owned();
  return loaded;
}

}  // namespace mustafar
