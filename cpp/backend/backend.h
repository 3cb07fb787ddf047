// What a device must be able to do to run a Llama: coarse operations over a ragged batch of
// sequences. The model graph (model/llama.cc) is written once over this interface; fusion happens
// inside an implementation. Pointers are memory of the backend's device unless a comment says host.
//
// Activations are f32, row-major. A batch's rows are the new tokens of its sequences, one after
// another. Two kinds of calls differ in how sums are ordered, so that a sequence's result does not
// depend on what else is in the batch:
//   decode   every sequence has exactly one row;
//   prefill  any number of rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cache_view.h"
#include "core/dtype.h"
#include "format/block_format.h"
#include "format/quantised_matrix.h"
#include "mustafar/model_config.h"

namespace mustafar {

class ThreadPool;

// A weight matrix: y = W x. Of f32, f16 or bf16, data is [rows][cols], aligned to its element. Of
// int8 or int4, data holds the codes of format/quantised_matrix.h, aligned to 64 bytes.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;  // outputs
  int64_t cols = 0;  // inputs

  // Of quantised matrices alone.
  int32_t group = 0;  // inputs that share a scale
  DType scale_dtype = DType::kF16;
  const void* scales = nullptr;  // [tile][group][16 rows] scale_dtype
  Offset offset = Offset::kNone;
  const void* offsets = nullptr;  // [tile][group][16 rows] uint8 zeros or scale_dtype minimums

  bool quantised() const { return !is_float(dtype); }
  QuantisedShape shape() const { return {dtype, scale_dtype, offset, group, rows, cols}; }
  // A quantised matrix over the shape's one allocation.
  static Matrix of(const QuantisedShape& shape, const void* memory) {
    const uint8_t* at = static_cast<const uint8_t*>(memory);
    return {at,
            shape.dtype,
            shape.rows,
            shape.cols,
            shape.group,
            shape.scale_dtype,
            at + shape.scales_at(),
            shape.offset,
            shape.offset != Offset::kNone ? at + shape.offsets_at() : nullptr};
  }
  // The zero at a place of scales, of a matrix that has no minimums.
  int32_t zero(int64_t at) const {
    return offset == Offset::kZeros ? static_cast<const uint8_t*>(offsets)[at] : middle_code(dtype);
  }
  // The weight of a code with the scale and offset at a place of those.
  float weight(int32_t code, int64_t at) const {
    const float scale = load_float(scales, scale_dtype, at);
    return offset == Offset::kMinimums
               ? std::fma(scale, static_cast<float>(code), load_float(offsets, scale_dtype, at))
               : scale * static_cast<float>(code - zero(at));
  }
};

struct LayerWeights {
  const float* attention_norm = nullptr;  // [hidden]; null: attention reads x as it is
  Matrix q, k, v;                         // [heads * head_dim, hidden]
  const float* q_bias = nullptr;          // [heads * head_dim] or null, likewise below
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  const float* q_norm = nullptr;  // [head_dim], [heads * head_dim] or null: Weights::qk_norm
  const float* k_norm = nullptr;
  bool rotates = true;  // RoPE turns queries and keys
  Matrix o;             // [hidden, n_heads * head_dim]
  const float* o_bias = nullptr;
  const float* attention_out_norm = nullptr;  // [hidden] or null: of what attention adds to x
  const float* mlp_norm = nullptr;            // [hidden]; null: the MLP reads x as it is
  const float* mlp_out_norm = nullptr;        // [hidden] or null: of what the MLP adds to x
  Matrix gate, up;                            // [intermediate, hidden]
  Matrix down;                                // [hidden, intermediate]
  const float* gate_bias = nullptr;
  const float* up_bias = nullptr;
  const float* down_bias = nullptr;
};

struct Weights {
  Matrix embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;             // [hidden]
  Matrix lm_head;                                // [vocab, hidden]
  const float* rope_frequencies = nullptr;       // [rope dims / 2]
  const float* long_rope_frequencies = nullptr;  // of SequenceView::long_rope, or null: the same
  float rope_scale = 1;                          // of sines and cosines
  float embedding_scale = 1;                     // of a row of the embedding on its way to x
  float query_scale = 1;                         // of queries, once they are rotated
  QkNorm qk_norm = QkNorm::kNone;
};

// One sequence's part in a call, and what only the host reads of it.
struct SequenceStep : SequenceView {
  const StoreLayout* layout = nullptr;  // host memory
  // [n_layers] host: tokens, its own among them, that a query of a layer sees, 0: all before it.
  // Null: all layers see all. Those of the model: of a batch's sequences alike.
  const int32_t* windows = nullptr;

  int32_t window(int32_t layer) const { return windows == nullptr ? 0 : windows[layer]; }
};

struct Batch {
  std::span<const SequenceStep> sequences;  // host memory
  int32_t n_rows = 0;
  bool decode = false;
};

// Moves blocks that left a sequence's window into its store (CommitView).
struct CommitStep : CommitView {
  const StoreLayout* layout = nullptr;  // host memory
};

// What greedy and top-k sampling need of a row of logits.
struct TopLogits {
  std::vector<float> values;  // the largest, descending
  std::vector<int32_t> ids;   // theirs; ties by the lower id
  double exp_sum = 0;         // of e^(logit - values[0]) over the row, relative error below 1e-5
  bool regular = false;       // no NaN, no +Inf, not all -Inf; else nothing else here says anything
};

// What scoring a text needs of a row of logits.
struct RowScore {
  int32_t target = 0;                // a token of the vocabulary
  const float* reference = nullptr;  // host, [vocab]: log-probabilities of another cache, or null
  float* log_probs = nullptr;        // host, [vocab]: where the row's own are to go, or null
  // Out. Natural logarithms.
  float log_prob = 0;     // of target
  int32_t top = 0;        // the most probable token, of several the lowest
  double divergence = 0;  // of the row from the reference, KL(reference || row)
};

// Scratch of one call in flight: grows to what the largest call so far needed.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual int64_t bytes() const = 0;
};

// An owned allocation on the device.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 protected:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string device() const = 0;       // "cpu", "cuda", "cuda:1"
  virtual std::string description() const = 0;  // e.g. "AVX-512 BF16, 2 threads"
  virtual bool host_memory() const = 0;         // device pointers can be read by the host
  // Rows of a prompt that pass through a layer together: enough for the matrix products to run at
  // full speed, few enough that activations stay small whatever the prompt's length.
  virtual int64_t prefill_rows() const { return 512; }
  virtual bool codes() const { return false; }              // coded rows are stored and attended to
  virtual bool layers_may_differ() const { return false; }  // StoreLayout::layers is looked at
  virtual bool expands() const { return false; }            // expand() is there
  virtual ThreadPool* host_pool() { return nullptr; }  // the threads it computes on, if the host's

  // Memory. Throws OutOfMemory. upload and download are synchronous.
  virtual std::unique_ptr<DeviceMemory> allocate(int64_t bytes) = 0;
  virtual void upload(void* device, const void* host, int64_t bytes) = 0;
  virtual void download(void* host, const void* device, int64_t bytes) = 0;
  virtual void copy(void* to, const void* from, int64_t bytes) = 0;  // device to device
  virtual int64_t available_bytes() const = 0;  // that allocate could still get, about

  virtual std::unique_ptr<Workspace> make_workspace() = 0;

  // Operations. x, q, out: f32 rows on the device.

  // out [n][hidden] = rows of the table, scaled. token_ids: host memory, checked by the caller.
  virtual void embed(const Weights& weights, std::span<const int32_t> token_ids, float* out) = 0;

  // Norm, the three projections and their biases, norms of q and k, RoPE, the sequence's KV
  // transform; keys and values are rounded to the tail dtype and appended (SequenceView::fresh or
  // dense). q: out, [n_rows][n_heads * D], in the cache's coordinates like the keys.
  virtual void project_qkv(const Weights& weights, int32_t layer, const Batch& batch,
                           const float* x, float* q, Workspace& workspace) = 0;

  // Softmax attention of every row over its sequence's cache and the call's tokens up to its own,
  // one online softmax; brings the output back to the model's own coordinates. out:
  // [n_rows][n_heads * D].
  virtual void attend(int32_t layer, const Batch& batch, const float* q, float* out,
                      Workspace& workspace) = 0;

  // x [n_rows][hidden] += W_o attention + bias, normed first where there is an attention_out_norm.
  virtual void project_output(const Weights& weights, int32_t layer, const Batch& batch,
                              const float* attention, float* x, Workspace& workspace) = 0;

  // x += W_down(silu(W_gate n) * (W_up n)), n = norm(x); normed first where there is an
  // mlp_out_norm.
  virtual void mlp(const Weights& weights, int32_t layer, const Batch& batch, float* x,
                   Workspace& workspace) = 0;

  // logits [rows.size()][vocab] of chosen rows of x (final norm, lm_head). rows: host memory.
  virtual void logits(const Weights& weights, const Batch& batch, std::span<const int32_t> rows,
                      const float* x, float* logits, Workspace& workspace) = 0;

  // What a host that can't read device memory may have instead of whole rows: of each of out.size()
  // rows of logits [.][vocab] the k largest (all, where there are fewer). out: host; synchronous.
  // 1 <= k <= max_top_logits().
  virtual int32_t max_top_logits() const { return 0; }
  virtual void top_logits(const float* logits, int64_t vocab, int32_t k, std::span<TopLogits> out,
                          Workspace& workspace) {
    (void)logits, (void)vocab, (void)k, (void)out, (void)workspace;
    throw std::logic_error(device() + " hands out whole rows of logits");
  }

  // Log-softmax of rows.size() rows of logits [.][vocab], of each what its RowScore asks for.
  // Synchronous. Unless a device knows better, rows come to the host.
  virtual void score_rows(const float* logits, int64_t vocab, std::span<RowScore> rows,
                          Workspace& workspace);

  // Prunes and compresses layers [first_layer, first_layer + n_layers) of every step. Throws
  // StateError naming layer and position where a row that must be quantised is not finite (then
  // new_pages and dense_out are undefined, dense and fresh unchanged unless dense_out is dense); a
  // device that does not wait for the answer throws it from the next synchronize().
  virtual void commit(std::span<const CommitStep> steps, int32_t first_layer, int32_t n_layers,
                      Workspace& workspace) = 0;

  // Dense rows of a sequence for a cache that keeps its rows in the coordinates of `to`: those of a
  // block of its store, or of its dense buffer (block kDenseRows), rounded to the tail dtype. out:
  // as SequenceView::dense, of out_capacity tokens; the dense buffer itself will do for its own
  // rows.
  static constexpr int32_t kDenseRows = -1;
  virtual void expand(const SequenceStep& step, int32_t block, const KVTransform& to, uint8_t* out,
                      int32_t out_capacity) {
    (void)step, (void)block, (void)to, (void)out, (void)out_capacity;
    throw std::logic_error(device() + " expands no blocks");
  }

  virtual void synchronize() = 0;

  // Runs a whole decode step: body calls the ops of `batch` from embed to logits, and nothing else
  // that has an effect: the same ones with the same pointers whenever `buffers` (every buffer of
  // the caller's that they use) and the shapes are the same. So a backend may record what body did
  // and later repeat that instead; lengths, positions and token ids are those of this call.
  virtual void decode_step(const Batch& batch, std::span<const int32_t> token_ids,
                           std::span<const void* const> buffers, Workspace& workspace,
                           const std::function<void()>& body) {
    (void)batch, (void)token_ids, (void)buffers, (void)workspace;
    body();
  }
};

struct BackendOptions {
  std::string device = "auto";  // as DeviceName::parse has it
  DType dtype = DType::kF32;    // arithmetic of prefill, and the tail's type
  int32_t threads = 0;          // 0: default_threads() (core/available_cores.h)
};

// "auto" is the first GPU where this build, the machine and the model allow it, else the CPU.
// Throws DeviceError saying what is missing where a device asked for by name can't be had.
std::unique_ptr<Backend> make_backend(const ModelConfig& config, const BackendOptions& options);

}  // namespace mustafar
