// The Llama graph, written once over the backend interface.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "kv/sequence_cache.h"
#include "model/weights.h"
#include "mustafar/model_config.h"

namespace mustafar {

// Device buffers of one call in flight, kept between calls and grown on demand.
class ForwardBuffers {
 public:
  explicit ForwardBuffers(Backend& backend);
  float* x(int64_t values) { return ensure(x_, values); }
  float* q(int64_t values) { return ensure(q_, values); }
  float* attention(int64_t values) { return ensure(attention_, values); }
  float* logits(int64_t values) { return ensure(logits_, values); }
  Workspace& workspace() { return *workspace_; }
  int64_t bytes() const;

 private:
  float* ensure(std::unique_ptr<DeviceMemory>& memory, int64_t values);

  Backend& backend_;
  std::unique_ptr<Workspace> workspace_;
  std::unique_ptr<DeviceMemory> x_, q_, attention_, logits_;
};

// Work on a model's graph shared by all its sessions; has no state of its own.
class Llama {
 public:
  // source: of matrices that are read where they lie, or null. What was computed from bytes that it
  // has lost meanwhile is refused: every call here and of Prefill throws as its check_read().
  Llama(const ModelConfig& config, const Weights& weights, Backend& backend,
        std::shared_ptr<const TensorSource> source = nullptr)
      : config_(config), weights_(weights), backend_(backend), source_(std::move(source)) {}

  // One decode step of several sequences: appends tokens[i] to caches[i] and writes the logits
  // after it to logits (host, [caches.size()][vocab]). All or none: throws with every cache
  // unchanged.
  void decode(std::span<SequenceCache* const> caches, std::span<const int32_t> tokens,
              float* logits, ForwardBuffers& buffers) const;

  // The same, but only the top_k largest logits of each row come to the host: to top
  // [caches.size()]. The rows stay in buffers.logits() until its next use. 1 <= top_k <=
  // Backend::max_top_logits().
  void decode_top(std::span<SequenceCache* const> caches, std::span<const int32_t> tokens,
                  int32_t top_k, std::span<TopLogits> top, ForwardBuffers& buffers) const;

 private:
  friend class Prefill;
  // Sees the rotated queries [rows][heads * D] of a layer, and through batch its keys and values.
  using Observer = std::function<void(int32_t layer, const Batch& batch, const float* q)>;
  // rows: where logits go, on the device; fetch: brings to the host what is wanted of them.
  void run_decode(std::span<SequenceCache* const> caches, std::span<const int32_t> tokens,
                  float* rows, const std::function<void()>& fetch, ForwardBuffers& buffers) const;
  void run_layer(int32_t layer, const Batch& batch, float* x, ForwardBuffers& buffers,
                 const Observer& observer = {}) const;
  void check_weights() const {
    if (source_ != nullptr) source_->check_read();
  }

  const ModelConfig& config_;
  const Weights& weights_;
  Backend& backend_;
  const std::shared_ptr<const TensorSource> source_;
};

// A sequence's part in a forward call.
struct PrefillPart {
  SequenceCache* cache = nullptr;
  std::vector<int32_t> tokens;
};

// One forward call of many tokens of one or several sequences, a layer at a time, so that other
// work can run in between. What a sequence gets does not depend on the others. The caches change in
// finish() alone: dropping a Prefill before leaves them as they were. Rows are the tokens of the
// parts, one after another.
class Prefill {
 public:
  // Takes what the call needs; throws OutOfMemory. The caches, all different, must outlive it and
  // not change meanwhile.
  Prefill(const Llama& llama, std::vector<PrefillPart> parts, ForwardBuffers& buffers);
  Prefill(const Llama& llama, SequenceCache& cache, std::vector<int32_t> tokens,
          ForwardBuffers& buffers);
  ~Prefill();

  // Runs the next layer; false once all have run. between: called after each part of a layer with
  // tokens x layers done so far and in all; what it throws stops the call.
  bool step(const std::function<void(int64_t done, int64_t total)>& between = {});
  // Runs the next rows of a layer, at most Backend::prefill_rows(): what step() makes a layer of.
  // False once all layers have run.
  bool step_rows();
  int64_t next_row() const { return next_row_; }  // of the call, that step_rows() begins with
  int64_t next_rows() const;                      // that step_rows() runs

  // Called in every later step(), after the projections of each chunk of rows.
  void observe(std::function<void(int32_t layer, const Batch& batch, const float* q)> observer) {
    observer_ = std::move(observer);
  }

  // Logits of rows [first, first + n) of the call, host, [n][vocab]. After the last step.
  void logits(int64_t first, int64_t n, float* out);
  // The same on the device, in buffers.logits() until its next use.
  const float* device_logits(int64_t first, int64_t n);
  int64_t last_row(size_t part) const { return parts_[part].row0 + parts_[part].n - 1; }
  // Logits of the last row of every part, host, [parts][vocab]; where the host reads device memory.
  void last_logits(float* out);
  // The top_k largest of row `row`; the row stays in buffers.logits(), see Llama::decode_top.
  TopLogits top_logits(int64_t row, int32_t top_k);
  // Takes the call into the caches. After the last step.
  void finish();

 private:
  struct Part {
    SequenceCache* cache = nullptr;
    int64_t row0 = 0;  // of its first token
    int64_t n = 0;     // tokens
    PendingAppend pending;
    KVMemory fresh;  // one layer's keys and values of the call
  };

  void commit_layer();
  // Logits of rows [first, first + n) to out, on the device.
  void compute_logits(int64_t first, int64_t n, float* out);
  // The steps of rows [first, first + n), cut from those of whole parts.
  std::vector<SequenceStep> chunk_of(std::span<const SequenceStep> calls, int64_t first,
                                     int64_t n) const;

  const Llama& llama_;
  ForwardBuffers& buffers_;
  std::vector<Part> parts_;
  int64_t n_rows_ = 0;
  float* x_ = nullptr;  // [n_rows][hidden]
  int32_t layer_ = 0;
  int64_t next_row_ = 0;             // of layer_
  std::vector<SequenceStep> calls_;  // of whole parts in layer_, once it has begun
  std::function<void(int32_t layer, const Batch& batch, const float* q)> observer_;
};

}  // namespace mustafar
