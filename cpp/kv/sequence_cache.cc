#include "kv/sequence_cache.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

#include "kv/slab_size.h"

namespace mustafar {
namespace {

// What the smallest dense buffer has room for. Few tokens of a large model are a megabyte already.
constexpr int64_t kFewestDenseTokens = 16;

DType dtype_of(ValueType type, DType tail) {
  switch (type) {
    case ValueType::kAuto:
      return tail;
    case ValueType::kF32:
      return DType::kF32;
    case ValueType::kF16:
      return DType::kF16;
    case ValueType::kBF16:
      return DType::kBF16;
    case ValueType::kInt8:
      return DType::kInt8;
    case ValueType::kInt4:
      return DType::kInt4;
    case ValueType::kCoded:
      return DType::kCoded;
  }
  return tail;
}

SlotLayout slot_layout(int32_t head_dim, bool is_key, double sparsity, const KVConfig& config,
                       PrunePolicy policy, DType dtype) {
  if (config.coded()) {
    return make_coded_layout(head_dim,
                             is_key ? config.effective_k_bits() : config.effective_v_bits());
  }
  const bool ragged = per_channel(policy);
  return make_slot_layout(head_dim, is_key, sparsity, config.pattern == Pattern::kGroup && !ragged,
                          dtype, ragged);
}

}  // namespace

CacheSpec make_cache_spec(const ModelConfig& model, DType tail_dtype, const KVConfig& config,
                          const RowSizes* rows) {
  CacheSpec spec;
  spec.config = config;
  spec.tail_dtype = tail_dtype;
  spec.n_layers = model.n_layers;
  spec.n_kv_heads = model.n_kv_heads;
  spec.head_dim = model.head_dim;
  const DType dtype = dtype_of(config.value_dtype, tail_dtype);
  const double k_sparsity = config.effective_k_sparsity(),
               v_sparsity = config.effective_v_sparsity();
  const SlotLayout k =
      slot_layout(model.head_dim, true, k_sparsity, config, config.k_policy, dtype);
  const SlotLayout v =
      slot_layout(model.head_dim, false, v_sparsity, config, config.v_policy, dtype);
  spec.layout = make_store_layout(model.n_layers, model.n_kv_heads, k, v);
  if (rows != nullptr) {
    auto layers = std::make_shared<std::vector<LayerSlots>>();
    for (size_t i = 0; i < rows->k_row_bytes.size(); i++) {
      layers->push_back({make_coded_slot(model.head_dim, rows->k_row_bytes[i]),
                         make_coded_slot(model.head_dim, rows->v_row_bytes[i])});
    }
    spec.layout = make_store_layout(*layers, model.n_kv_heads);
    spec.layers = std::move(layers);
    spec.predicted_kld = rows->predicted_kld;
  }
  spec.most_dense_tokens = config.sink_tokens + config.window + kBlockTokens;
  if ((k_sparsity > 0 && needs_queries(config.k_policy)) ||
      (v_sparsity > 0 && needs_queries(config.v_policy))) {
    // Without a window there is still a query to rank by: that of the newest token.
    spec.query_window = std::max(config.window, 1);
  }
  if (model.sliding_window > 0) {
    spec.widest_window = model.sliding_window;
    for (int32_t layer = 0; layer < model.n_layers; layer++) {
      spec.windows.push_back(model.window_of(layer));
      if (spec.windows.back() == 0) spec.widest_window = 0;
    }
  }
  spec.query_bytes =
      int64_t{4} * spec.n_layers * spec.n_kv_heads * spec.query_window * spec.head_dim;
  return spec;
}

int32_t CacheSpec::dense_capacity(int64_t n) const {
  // 16, 24, 32, 48, 64, 96 and so on: powers of two and the middle between each and the next.
  int64_t capacity = kFewestDenseTokens;
  for (int64_t power = kFewestDenseTokens; capacity < n; power *= 2) {
    capacity = n <= power + power / 2 ? power + power / 2 : 2 * power;
  }
  // Where little is left to grow, it is taken at once. So a buffer has its full size before a block
  // is due, and no call both grows it and compresses from it.
  if (capacity + capacity / 4 > most_dense_tokens) return most_dense_tokens;
  return static_cast<int32_t>(capacity);
}

SequenceCache::SequenceCache(Backend& backend, std::shared_ptr<BlockPool> pool,
                             std::shared_ptr<KVBudget> budget,
                             std::shared_ptr<const CacheSpec> spec, bool long_rope)
    : backend_(&backend),
      pool_(std::move(pool)),
      budget_(std::move(budget)),
      spec_(std::move(spec)),
      long_rope_(long_rope) {}

DenseBuffer SequenceCache::new_dense(int32_t capacity) const {
  return {KVMemory(*backend_, budget_, spec_->dense_bytes(capacity)), capacity};
}

KVMemory SequenceCache::new_query_magnitude() const {
  KVMemory memory(*backend_, budget_, spec_->query_bytes);
  const std::vector<uint8_t> zeros(spec_->query_bytes);
  backend_->upload(memory.data(), zeros.data(), spec_->query_bytes);
  return memory;
}

SequenceCache SequenceCache::fork() const {
  SequenceCache other(*backend_, pool_, budget_, spec_, long_rope_);
  other.pages_ = pages_;
  other.dropped_blocks_ = dropped_blocks_;
  other.length_ = length_;
  other.refresh_page_table();
  if (dense_.capacity > 0) {
    other.dense_ = new_dense(dense_.capacity);
    backend_->copy(other.dense_.memory.data(), dense_.memory.data(), dense_.memory.bytes());
  }
  if (query_magnitude_.data() != nullptr) {
    other.query_magnitude_ = KVMemory(*backend_, budget_, spec_->query_bytes);
    backend_->copy(other.query_magnitude_.data(), query_magnitude_.data(), spec_->query_bytes);
  }
  return other;
}

SequenceCache SequenceCache::cut_store(int64_t length) const {
  SequenceCache other(*backend_, pool_, budget_, spec_, long_rope_);
  const int64_t stored = spec_->compressed(length);
  other.pages_.assign(pages_.begin(), pages_.begin() + stored / kBlockTokens - dropped_blocks_);
  other.dropped_blocks_ = dropped_blocks_;
  other.refresh_page_table();
  // Sinks lead the dense buffer; whatever follows them is overwritten by what is recomputed.
  const int64_t sinks = std::min<int64_t>(spec_->config.sink_tokens, length);
  if (sinks > 0) {
    other.dense_ = new_dense(dense_.capacity);
    backend_->copy(other.dense_.memory.data(), dense_.memory.data(), dense_.memory.bytes());
  }
  other.length_ = stored + sinks;
  return other;
}

void SequenceCache::cut_tail(int64_t length) { length_ = length; }

PendingAppend SequenceCache::prepare(int64_t n, bool in_place) {
  PendingAppend pending;
  pending.n_tokens = n;
  const int64_t new_blocks = (spec_->compressed(length_ + n) - compressed()) / kBlockTokens;
  const int64_t now = dense_tokens();
  // The dense buffers first: they are the smaller, and what a refused page leaves is dropped with
  // them. None is smaller than the one before it: what a sequence came to need it will need again.
  if (in_place && now + n > dense_.capacity) {
    pending.grown = new_dense(spec_->dense_capacity(now + n));
  }
  if (!in_place || new_blocks > 0) {
    const int32_t after = spec_->dense_capacity(now + n - new_blocks * kBlockTokens);
    pending.dense = new_dense(std::max({after, dense_.capacity, pending.grown.capacity}));
  }
  if (spec_->query_bytes > 0) {
    if (query_magnitude_.data() == nullptr) {
      pending.query_magnitude = new_query_magnitude();
    } else if (!in_place) {
      pending.query_magnitude = KVMemory(*backend_, budget_, spec_->query_bytes);
      backend_->copy(pending.query_magnitude.data(), query_magnitude_.data(), spec_->query_bytes);
    }
  }
  if (new_blocks > 0) {
    // A long prompt's first blocks may be out of sight of what comes after it.
    const int64_t unseen = std::max<int64_t>(0, spec_->dropped_blocks(length_ + n) - n_blocks());
    pending.new_pages = pool_->allocate(new_blocks - unseen);
    pending.new_page_addresses.resize(unseen);
    for (const PageRef& page : pending.new_pages) pending.new_page_addresses.push_back(page.data());
    prepare_page_table(pending);
    pages_.reserve(pages_.size() + pending.new_pages.size());
    page_addresses_.reserve(pages_.size() + pending.new_pages.size());
  }
  return pending;
}

void SequenceCache::copy_to_grown(const PendingAppend& pending, Workspace& workspace) const {
  if (pending.grown.capacity == 0 || dense_tokens() == 0) return;
  const SequenceStep step = view_of(dense_);
  CommitStep move;
  move.sequence = step;
  move.layout = step.layout;
  move.dense_tokens = step.dense_tokens;
  move.end_pos = static_cast<int32_t>(length_);
  move.dense_out = static_cast<uint8_t*>(pending.grown.memory.data());
  move.dense_out_capacity = pending.grown.capacity;
  backend_->commit({&move, 1}, 0, spec_->n_layers, workspace);
}

// The new pages' addresses, null for those never seen, follow the old ones', where nothing looks
// for them until apply().
void SequenceCache::prepare_page_table(PendingAppend& pending) const {
  if (backend_->host_memory()) return;
  constexpr int64_t kAddress = sizeof(uint8_t*);
  const int64_t old_bytes = kAddress * static_cast<int64_t>(pages_.size());
  const int64_t new_bytes = kAddress * static_cast<int64_t>(pending.new_page_addresses.size());
  int64_t end = kAddress * table_start_ + old_bytes;
  void* table = page_table_.data();
  if (page_table_.bytes() < end + new_bytes) {
    pending.page_table = KVMemory(*backend_, budget_, 2 * (old_bytes + new_bytes));
    table = pending.page_table.data();
    end = old_bytes;
    if (old_bytes > 0) backend_->upload(table, page_addresses_.data(), old_bytes);
  }
  backend_->upload(static_cast<uint8_t*>(table) + end, pending.new_page_addresses.data(),
                   new_bytes);
}

SequenceStep SequenceCache::view_of(const DenseBuffer& dense) const {
  SequenceStep step;
  step.pos0 = static_cast<int32_t>(length_);
  step.layout = &spec_->layout;
  step.long_rope = long_rope_;
  step.pages = page_table_.data() != nullptr
                   ? static_cast<const uint8_t* const*>(page_table_.data()) + table_start_
                   : page_addresses_.data();
  step.n_blocks = static_cast<int32_t>(pages_.size());
  step.dropped_blocks = static_cast<int32_t>(dropped_blocks_);
  if (!spec_->windows.empty()) step.windows = spec_->windows.data();
  assert(dropped_blocks_ == 0 || length_ + 1 - spec_->widest_window >=
                                     spec_->config.sink_tokens + dropped_blocks_ * kBlockTokens);
  step.dense = static_cast<uint8_t*>(dense.memory.data());
  step.dense_capacity = dense.capacity;
  step.dense_tokens = static_cast<int32_t>(dense_tokens());
  step.n_sinks = spec_->config.sink_tokens;
  if (spec_->transform != nullptr) step.transform = *spec_->transform;
  if (spec_->codes != nullptr) step.codes = *spec_->codes;
  step.query_magnitude = static_cast<float*>(query_magnitude_.data());
  step.query_window = spec_->query_window;
  return step;
}

SequenceStep SequenceCache::view(const PendingAppend& pending) const {
  // A first prefill has no dense tokens to attend to, so any buffer will do: the one it will fill.
  const DenseBuffer& before = dense_.capacity > 0 ? dense_ : pending.dense;
  SequenceStep step = view_of(pending.grown.capacity > 0 ? pending.grown : before);
  step.n_rows = static_cast<int32_t>(pending.n_tokens);
  if (pending.query_magnitude.data() != nullptr) {
    step.query_magnitude = static_cast<float*>(pending.query_magnitude.data());
  }
  return step;
}

CommitStep SequenceCache::commit_view(const PendingAppend& pending,
                                      const SequenceStep& step) const {
  CommitStep commit;
  commit.sequence = step;
  commit.layout = step.layout;
  const int32_t n = static_cast<int32_t>(pending.n_tokens);
  commit.dense_tokens = step.fresh != nullptr ? step.dense_tokens : step.dense_tokens + n;
  commit.fresh_tokens = step.fresh != nullptr ? n : 0;
  commit.new_pages = pending.new_page_addresses.data();
  if (!backend_->host_memory() && !pending.new_pages.empty()) {
    const bool moves = pending.page_table.data() != nullptr;
    const KVMemory& table = moves ? pending.page_table : page_table_;
    commit.new_pages = static_cast<uint8_t* const*>(table.data()) + (moves ? 0 : table_start_) +
                       static_cast<int64_t>(pages_.size());
  }
  commit.n_new_blocks = static_cast<int32_t>(pending.new_page_addresses.size());
  commit.end_pos = static_cast<int32_t>(length_) + n;
  commit.dense_out = static_cast<uint8_t*>(pending.dense.memory.data());
  commit.dense_out_capacity = pending.dense.capacity;
  commit.k_policy = spec_->config.k_policy;
  commit.v_policy = spec_->config.v_policy;
  return commit;
}

void SequenceCache::apply(PendingAppend&& pending) noexcept {
  // What was cut back may have dropped more than its length asks for.
  const int64_t dropped =
      std::max(dropped_blocks_, spec_->dropped_blocks(length_ + pending.n_tokens));
  const auto of_held = static_cast<int64_t>(pages_.size());
  const int64_t out = std::min(dropped - dropped_blocks_, of_held);
  pages_.erase(pages_.begin(), pages_.begin() + out);
  page_addresses_.erase(page_addresses_.begin(), page_addresses_.begin() + out);
  dropped_blocks_ = dropped;
  if (pending.page_table.data() != nullptr) {
    page_table_ = std::move(pending.page_table);
    table_start_ = 0;
  }
  table_start_ += out + std::ssize(pending.new_page_addresses) - std::ssize(pending.new_pages);
  for (PageRef& page : pending.new_pages) {
    page_addresses_.push_back(page.data());
    pages_.push_back(std::move(page));
  }
  if (pending.dense.capacity > 0) {
    dense_ = std::move(pending.dense);
  } else if (pending.grown.capacity > 0) {
    dense_ = std::move(pending.grown);
  }
  if (pending.query_magnitude.data() != nullptr) {
    query_magnitude_ = std::move(pending.query_magnitude);
  }
  length_ += pending.n_tokens;
}

namespace {

// Rows of n tokens from buffers of one capacity to those of another: [n_planes][capacity][row].
void copy_planes(const uint8_t* from, int64_t from_capacity, uint8_t* to, int64_t to_capacity,
                 int64_t n_planes, int64_t n, int64_t row_bytes) {
  for (int64_t plane = 0; plane < n_planes; plane++) {
    std::memcpy(to + plane * to_capacity * row_bytes, from + plane * from_capacity * row_bytes,
                n * row_bytes);
  }
}

}  // namespace

std::vector<uint8_t> SequenceCache::download_dense() const {
  const CacheSpec& spec = *spec_;
  std::vector<uint8_t> out(spec.dense_bytes(spec.most_dense_tokens));
  if (dense_tokens() == 0) return out;
  std::vector<uint8_t> held(dense_.memory.bytes());
  backend_->download(held.data(), dense_.memory.data(), dense_.memory.bytes());
  copy_planes(held.data(), dense_.capacity, out.data(), spec.most_dense_tokens,
              int64_t{2} * spec.n_layers * spec.n_kv_heads, dense_tokens(),
              dtype_bytes(spec.tail_dtype, spec.head_dim));
  return out;
}

std::vector<uint8_t> SequenceCache::download_query_magnitude() const {
  std::vector<uint8_t> out(spec_->query_bytes);
  if (query_magnitude_.data() != nullptr) {
    backend_->download(out.data(), query_magnitude_.data(), spec_->query_bytes);
  }
  return out;
}

void SequenceCache::restore(std::vector<PageRef> pages, int64_t dropped_blocks, int64_t length,
                            const uint8_t* dense, const uint8_t* query_magnitude) {
  const CacheSpec& spec = *spec_;
  pages_ = std::move(pages);
  dropped_blocks_ = dropped_blocks;
  length_ = length;
  refresh_page_table();
  if (dense_tokens() > 0) {
    dense_ = new_dense(spec.dense_capacity(dense_tokens()));
    std::vector<uint8_t> held(dense_.memory.bytes());
    copy_planes(dense, spec.most_dense_tokens, held.data(), dense_.capacity,
                int64_t{2} * spec.n_layers * spec.n_kv_heads, dense_tokens(),
                dtype_bytes(spec.tail_dtype, spec.head_dim));
    backend_->upload(dense_.memory.data(), held.data(), dense_.memory.bytes());
  }
  if (spec.query_bytes > 0 && length > 0) {
    query_magnitude_ = KVMemory(*backend_, budget_, spec.query_bytes);
    backend_->upload(query_magnitude_.data(), query_magnitude, spec.query_bytes);
  }
}

void SequenceCache::refresh_page_table() {
  page_addresses_.clear();
  for (const PageRef& page : pages_) page_addresses_.push_back(page.data());
  if (backend_->host_memory() || pages_.empty()) return;
  table_start_ = 0;
  const int64_t bytes = static_cast<int64_t>(pages_.size() * sizeof(uint8_t*));
  if (page_table_.bytes() < bytes) page_table_ = KVMemory(*backend_, budget_, 2 * bytes);
  backend_->upload(page_table_.data(), page_addresses_.data(), bytes);
}

namespace {

// Bytes of pages that a cache of n tokens may hold: where blocks are dropped, a new one is there
// before the oldest goes.
int64_t page_bytes_of(const CacheSpec& spec, int64_t n) {
  const int64_t coming = spec.dropped_blocks(n) > 0 ? 1 : 0;
  return (spec.held_blocks(n) + coming) * spec.layout.page_bytes;
}

}  // namespace

int64_t SequenceCache::bytes_for(const CacheSpec& spec, int64_t prompt, int64_t n) {
  const auto pages = [&](int64_t tokens) { return page_bytes_of(spec, tokens); };
  // Two dense buffers exist while a call replaces one by the other.
  const int64_t dense = spec.dense_capacity(std::min<int64_t>(n, spec.most_dense_tokens));
  return 2 * (spec.dense_bytes(dense) + spec.query_bytes) +
         std::max(pages(n), pages(prompt) + spec.fresh_bytes(prompt));
}

// What prepare() and fresh() take, beside what is there before.
int64_t SequenceCache::call_bytes(const CacheSpec& spec, int64_t from, int64_t to,
                                  int32_t& dense_capacity) {
  const int64_t stored = spec.compressed(to);
  // Those of before, and the new ones that stay.
  const int64_t blocks_before = spec.compressed(from) / kBlockTokens;
  const int64_t blocks = spec.held_blocks(from) + stored / kBlockTokens -
                         std::max(blocks_before, spec.dropped_blocks(to));
  const int64_t dense_before = spec.dense_bytes(dense_capacity);
  dense_capacity = std::max(dense_capacity, spec.dense_capacity(to - stored));
  const int64_t pages = blocks > 0 ? slab_bytes(spec.layout.page_bytes, blocks) : 0;
  return pages + dense_before + spec.dense_bytes(dense_capacity) +
         (from > 0 ? 2 : 1) * spec.query_bytes + spec.fresh_bytes(to - from);
}

int64_t SequenceCache::held_bytes(const CacheSpec& spec, int64_t n) {
  const int64_t dense = std::min<int64_t>(n, spec.most_dense_tokens);
  return spec.dense_bytes(spec.dense_capacity(dense)) + spec.query_bytes + page_bytes_of(spec, n);
}

MemoryUsage SequenceCache::memory() const {
  MemoryUsage usage;
  const CacheSpec& spec = *spec_;
  const int64_t blocks = static_cast<int64_t>(pages_.size());
  const int64_t slots = blocks * spec.n_kv_heads;
  for (int32_t i = 0; i < 2 * spec.n_layers; i++) {
    const SlotLayout& slot = slot_of(spec.layout, i / 2, i % 2 == 0);
    const int64_t masks = kBlockTokens * 4 * slot.mask_words;
    const int64_t scales = has_scales(slot.dtype) ? kBlockTokens * 2 : 0;
    const int64_t values = int64_t{kBlockTokens} * slot.row_bytes;
    usage.masks += slots * masks;
    usage.values += slots * values;
    usage.scales += slots * scales;
    usage.padding += slots * (slot.slot_bytes - masks - scales - values);
  }
  usage.tail = dense_.memory.bytes();
  usage.policy = query_magnitude_.bytes();
  usage.padding += page_table_.bytes();
  usage.allocated =
      usage.masks + usage.values + usage.scales + usage.padding + usage.tail + usage.policy;
  usage.used = usage.allocated - usage.tail + spec.dense_bytes(dense_tokens());
  usage.compressed_tokens = kBlockTokens * blocks;
  usage.dense_tokens = dense_tokens();
  int64_t seen = 0;  // tokens that the layers' windows reach, of all layers
  for (int32_t layer = 0; layer < spec.n_layers; layer++) {
    const int64_t window = spec.windows.empty() ? 0 : spec.windows[layer];
    seen += window > 0 ? std::min(window, length_) : length_;
  }
  usage.dense_equivalent = int64_t{2} * 2 * seen * spec.n_kv_heads * spec.head_dim;
  usage.k_sparsity = 1.0 - static_cast<double>(spec.layout.k.row_keep) / spec.head_dim;
  usage.v_sparsity = 1.0 - static_cast<double>(spec.layout.v.row_keep) / spec.head_dim;
  return usage;
}

}  // namespace mustafar
