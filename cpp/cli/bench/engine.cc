#include "cli/bench/engine.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <utility>

#include "core/buffer.h"
#include "runtime/session_impl.h"

namespace mustafar::cli {
namespace {

// Another source's tensors in memory of their own.
class CopiedTensors : public TensorSource {
 public:
  explicit CopiedTensors(std::shared_ptr<const TensorSource> source) : source_(std::move(source)) {}

  bool has(const std::string& name) const override { return source_->has(name); }

  StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    const StoredTensor original = source_->tensor(name, shape);
    int64_t n = 1;
    for (const int64_t extent : shape) n *= extent;
    const std::lock_guard lock(mutex_);
    auto [entry, is_new] = copies_.try_emplace(name);
    if (is_new) {
      entry->second = HostBuffer(dtype_bytes(original.dtype, n));
      std::memcpy(entry->second.data(), original.data, entry->second.bytes());
    }
    return {entry->second.data(), original.dtype};
  }

 private:
  const std::shared_ptr<const TensorSource> source_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, HostBuffer> copies_;
};

int64_t values_of(const Matrix& matrix) { return matrix.rows * matrix.cols; }
int64_t bytes_of(const Matrix& matrix) {
  return matrix.quantised() ? matrix.shape().bytes() : dtype_bytes(matrix.dtype, values_of(matrix));
}

template <typename Count>
int64_t sum_layers(const Weights& weights, const Count& count) {
  int64_t total = 0;
  for (const LayerWeights& layer : weights.layers) {
    for (const Matrix* matrix :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      total += count(*matrix);
    }
  }
  return total;
}

}  // namespace

Engine::Engine(std::string name, const ModelConfig& config,
               std::shared_ptr<const TensorSource> source, const ModelOptions& options)
    : name_(std::move(name)), config_(config), source_(std::move(source)), options_(options) {}

const Model& Engine::model(int replica) {
  while (static_cast<int>(models_.size()) <= replica) {
    auto source = models_.empty() ? source_ : std::make_shared<const CopiedTensors>(source_);
    models_.push_back(make_model(config_, std::move(source), options_));
  }
  return models_[replica];
}

int64_t Engine::parameters() {
  const Weights& weights = model().impl()->weights.table;
  const bool tied = weights.embedding.data == weights.lm_head.data;
  return sum_layers(weights, values_of) + values_of(weights.lm_head) +
         (tied ? 0 : values_of(weights.embedding));
}

int64_t Engine::stored_bytes() { return model().memory().weights_bytes; }

int64_t Engine::bytes_read_per_step() {
  const Weights& weights = model().impl()->weights.table;
  return sum_layers(weights, bytes_of) + bytes_of(weights.lm_head);
}

void fill_sessions(std::span<Session> sessions, int64_t n, uint64_t seed) {
  if (n == 0 || sessions.empty()) return;
  Backend& backend = *sessions[0].impl().engine->backend;
  const CacheSpec& spec = *sessions[0].impl().spec;

  // Rows are runs of a table of normal values, at random offsets.
  constexpr int64_t kTable = 1 << 16;
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  const int64_t value_bytes = dtype_bytes(spec.tail_dtype, 1);
  HostBuffer table(kTable * value_bytes);
  for (int64_t i = 0; i < kTable; i++)
    store_float(table.data(), spec.tail_dtype, i, normal(random));
  HostBuffer rows(spec.fresh_bytes(n));
  const int64_t row_bytes = spec.head_dim * value_bytes;
  for (int64_t at = 0; at < spec.fresh_bytes(n); at += row_bytes) {
    const int64_t offset = static_cast<int64_t>(random() % (kTable - spec.head_dim)) * value_bytes;
    std::memcpy(rows.as<char>() + at, table.as<char>() + offset, row_bytes);
  }
  const auto fresh = backend.allocate(spec.fresh_bytes(n));
  backend.upload(fresh->data(), rows.data(), spec.fresh_bytes(n));
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; i++) {
    ids.push_back(static_cast<int32_t>(random() % sessions[0].model().config().vocab_size));
  }

  for (Session& session : sessions) {
    Session::Impl& impl = session.impl();
    impl.check_room(n);
    SequenceCache& cache = *impl.cache;
    PendingAppend pending = cache.prepare(n, /*in_place=*/false);
    SequenceStep step = cache.view(pending);
    step.n_rows = static_cast<int32_t>(n);
    step.fresh = static_cast<uint8_t*>(fresh->data());
    step.fresh_capacity = static_cast<int32_t>(n);
    step.fresh_pos0 = step.pos0;
    if (step.query_magnitude != nullptr) {
      const std::vector<float> ones(spec.query_bytes / sizeof(float), 1.0f);
      backend.upload(step.query_magnitude, ones.data(), spec.query_bytes);
    }
    const CommitStep commit = cache.commit_view(pending, step);
    for (int32_t layer = 0; layer < spec.n_layers; layer++) {
      backend.commit({&commit, 1}, layer, 1, impl.buffers->workspace());
    }
    backend.synchronize();
    cache.apply(std::move(pending));
    impl.append_tokens(ids);
    impl.next.drop();
  }
}

BatchStep::BatchStep(const Model& model) : engine_(model.impl()), buffers_(*engine_->backend) {}

void BatchStep::run(std::span<Session> sessions, int32_t token) {
  std::vector<SequenceCache*> caches;
  for (Session& session : sessions) {
    session.impl().check_room(1);
    caches.push_back(&*session.impl().cache);
  }
  const std::vector<int32_t> tokens(sessions.size(), token);
  if (NextLogits::top_suffices(*engine_->backend, 1)) {
    std::vector<TopLogits> top(sessions.size());
    engine_->llama->decode_top(caches, tokens, 1, top, buffers_);
  } else {
    logits_.resize(sessions.size() * engine_->config.vocab_size);
    engine_->llama->decode(caches, tokens, logits_.data(), buffers_);
  }
}

int64_t cache_bytes_read(const Session& session) {
  const CacheSpec& spec = *session.impl().spec;
  const int64_t n = session.position(), stored = spec.compressed(n);
  const int64_t sinks = std::min<int64_t>(spec.config.sink_tokens, n);
  int64_t bytes = 0;
  for (int32_t layer = 0; layer < spec.n_layers; layer++) {
    // Whole blocks before a layer's window are not read, nor are its dense rows.
    const int64_t window = spec.windows.empty() ? 0 : spec.windows[layer];
    const int64_t first = window > 0 ? std::max<int64_t>(0, n + 1 - window) : 0;
    const int64_t unread = std::clamp<int64_t>(first - sinks, 0, stored) / kBlockTokens;
    for (const bool is_key : {true, false}) {
      const SlotLayout& slot = slot_of(spec.layout, layer, is_key);
      const int64_t row = 4 * slot.mask_words + slot.row_bytes + (has_scales(slot.dtype) ? 2 : 0);
      bytes += (stored - unread * kBlockTokens) * spec.n_kv_heads * row;
    }
    const int64_t unseen = first < sinks ? first : std::max(sinks, first - stored);
    bytes += spec.fresh_bytes(std::max<int64_t>(0, n - stored - unseen));
  }
  return bytes;
}

}  // namespace mustafar::cli
