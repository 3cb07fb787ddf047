// One sequence's keys and values: sinks and tail dense, everything older in compressed pages.
// The schedule is that of the format: with n tokens cached, the compressed_tokens(n, sinks, window)
// tokens after the sinks are in pages, 64 to a page; the rest is in the dense buffer. That buffer
// grows with what is in it, so that a short sequence holds little and an empty one nothing.
//
// Where all layers have a sliding window, the store drops its oldest pages once no query to come
// can see them, nor one after a rewind by a block.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kv/block_pool.h"
#include "kv/row_sizes.h"
#include "mustafar/kv_config.h"
#include "mustafar/memory_usage.h"
#include "mustafar/model_config.h"

namespace mustafar {

// What a cache is made of: fixed at its creation, shared by forks.
struct CacheSpec {
  KVConfig config;
  StoreLayout layout;
  std::shared_ptr<const std::vector<LayerSlots>> layers;  // that the layout points to, or null
  double predicted_kld = 0;                               // of a budget, nats a token
  DType tail_dtype = DType::kF32;
  int32_t n_layers = 0;
  int32_t n_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t most_dense_tokens = 0;  // that are dense at any time: sinks + window + 64
  int32_t query_window = 0;       // queries whose magnitude is kept; 0 where no policy asks
  int64_t query_bytes = 0;        // of the query magnitudes
  // [n_layers] tokens, its own among them, that a query sees, 0: all before it; empty: all see all.
  std::vector<int32_t> windows;
  int32_t widest_window = 0;                     // the widest of all layers; 0: some see all
  std::shared_ptr<const KVTransform> transform;  // device pointers, or null
  std::shared_ptr<const CodeTables> codes;       // device pointers, where rows are coded

  int64_t compressed(int64_t n) const {
    return compressed_tokens(n, config.sink_tokens, config.window);
  }
  // The store's oldest blocks that no query sees any more, once the next one stands right behind
  // `stored` compressed tokens.
  int64_t unseen_blocks(int64_t stored) const {
    if (widest_window == 0 || stored < widest_window) return 0;
    return (stored + 1 - widest_window) / kBlockTokens;
  }
  // Those that a cache drops on its way to n tokens: it can still go back by a block.
  int64_t dropped_blocks(int64_t n) const { return unseen_blocks(compressed(n) - kBlockTokens); }
  int64_t held_blocks(int64_t n) const { return compressed(n) / kBlockTokens - dropped_blocks(n); }
  // Bytes of one layer's keys and values of n tokens in the tail's type.
  int64_t fresh_bytes(int64_t n) const {
    return 2 * n_kv_heads * n * dtype_bytes(tail_dtype, head_dim);
  }
  // Bytes of n dense tokens in all layers.
  int64_t dense_bytes(int64_t n) const { return n_layers * fresh_bytes(n); }
  // Tokens that a dense buffer for n of them (at most most_dense_tokens) is made for: in steps of
  // about half as many again, so that a sequence that grows token by token copies each row only a
  // few times.
  int32_t dense_capacity(int64_t n) const;
};

// Layouts of a model's cache under a configuration that has been validated, with no transform yet.
// Throws std::invalid_argument where a combination is refused, naming the fields. rows: the sizes
// of coded rows in every layer, which a configuration with a budget needs; null: as its bits say.
CacheSpec make_cache_spec(const ModelConfig& model, DType tail_dtype, const KVConfig& config,
                          const RowSizes* rows = nullptr);

// Sinks and tail: [n_layers][2 (K, V)][n_kv_heads][capacity][head_dim], tail dtype.
struct DenseBuffer {
  KVMemory memory;
  int32_t capacity = 0;  // tokens
};

// What a call will change, prepared before it starts so that nothing can fail for want of memory
// once it runs, and dropped if it fails.
struct PendingAppend {
  int64_t n_tokens = 0;
  std::vector<PageRef> new_pages;
  std::vector<uint8_t*>
      new_page_addresses;    // of all new blocks, null where they are dropped at once
  KVMemory page_table;       // what the cache's becomes; empty where that has room, or has none
  DenseBuffer grown;         // for a call in place that finds the dense buffer full: a larger one
  DenseBuffer dense;         // where the commit writes what stays dense; empty where there is none
  KVMemory query_magnitude;  // what the query magnitudes become; empty where they stay
};

class SequenceCache {
 public:
  // long_rope: see SequenceStep.
  SequenceCache(Backend& backend, std::shared_ptr<BlockPool> pool, std::shared_ptr<KVBudget> budget,
                std::shared_ptr<const CacheSpec> spec, bool long_rope = false);
  SequenceCache(SequenceCache&&) = default;
  SequenceCache& operator=(SequenceCache&&) = default;

  const CacheSpec& spec() const { return *spec_; }
  int64_t length() const { return length_; }
  // Tokens behind the sinks that were compressed, those dropped among them.
  int64_t compressed() const { return kBlockTokens * n_blocks(); }
  int64_t dropped_blocks() const { return dropped_blocks_; }
  bool long_rope() const { return long_rope_; }

  // A cache of the same contents: pages shared, dense buffer copied.
  SequenceCache fork() const;
  // Whether what goes on from the first `length` tokens needs no page that was dropped.
  bool can_cut(int64_t length) const {
    return dropped_blocks_ <= spec_->unseen_blocks(spec_->compressed(length));
  }
  // A cache that holds sinks and store of the first `length` tokens alone, sharing pages; the
  // caller recomputes the tokens from its length() to `length`. Needs length < this->length() and
  // can_cut(length).
  SequenceCache cut_store(int64_t length) const;
  // Drops dense tokens from the end; needs compressed(length) == compressed().
  void cut_tail(int64_t length);

  // Everything that appending n tokens needs. in_place: the call writes its rows into the dense
  // buffer (decode), so that without a commit nothing is copied. Throws OutOfMemory, unchanged.
  PendingAppend prepare(int64_t n, bool in_place);
  // Before a call in place: copies the dense tokens to the larger buffer, where there is one.
  void copy_to_grown(const PendingAppend& pending, Workspace& workspace) const;
  // Keys and values of one layer of a call of n tokens (SequenceView::fresh), within the budget.
  KVMemory fresh(int64_t n) const { return KVMemory(*backend_, budget_, spec_->fresh_bytes(n)); }
  // The parts of a call's views that depend on the cache alone.
  SequenceStep view(const PendingAppend& pending) const;
  CommitStep commit_view(const PendingAppend& pending, const SequenceStep& step) const;
  void apply(PendingAppend&& pending) noexcept;

  // Bytes that a new cache needs at most, on its way over a prompt in one call to n tokens.
  static int64_t bytes_for(const CacheSpec& spec, int64_t prompt, int64_t n);
  // Bytes that a cache of `from` tokens holds at least during one call of a prompt that brings it
  // to `to`. dense_capacity: tokens of its dense buffer before the call (0: none), then after it.
  static int64_t call_bytes(const CacheSpec& spec, int64_t from, int64_t to,
                            int32_t& dense_capacity);
  // Bytes that one of n tokens holds between calls, about.
  static int64_t held_bytes(const CacheSpec& spec, int64_t n);
  MemoryUsage memory() const;
  // What it holds beside its pages, which forks share.
  int64_t own_bytes() const {
    return dense_.memory.bytes() + query_magnitude_.bytes() + page_table_.bytes();
  }

  // Brings caches of one spec to another of the same sinks, window and shape, which keeps no query
  // magnitudes: block by block, expanded and compressed again, the dense rows to its basis. Pages
  // that several of them share are shared again. Old pages are given back first: beside the budget
  // it takes a block's dense rows, and new pages until what is left of an old slab has gone. Needs
  // Backend::expands(). Where it throws (OutOfMemory: the new pages have no room though the old
  // ones are gone; StateError: see Backend::commit) the caches can only be dropped.
  static void recode(std::span<SequenceCache* const> caches, const std::shared_ptr<BlockPool>& pool,
                     const std::shared_ptr<const CacheSpec>& spec);
  // Bytes of the budget that recode leaves over for others; less than 0 where it takes more.
  static int64_t recode_gain(std::span<SequenceCache* const> caches, const BlockPool& pool);

  const std::vector<PageRef>& pages() const { return pages_; }  // after those dropped
  // For state files, which hold every cache in one shape whatever its buffers are: the dense tokens
  // as in a DenseBuffer of capacity most_dense_tokens, zeros where there is none; and the query
  // magnitudes, query_bytes of them. Host memory.
  std::vector<uint8_t> download_dense() const;
  std::vector<uint8_t> download_query_magnitude() const;
  // Makes an empty cache one of `length` tokens: pages already filled, after those dropped; dense
  // tokens and query magnitudes as above. Throws OutOfMemory.
  void restore(std::vector<PageRef> pages, int64_t dropped_blocks, int64_t length,
               const uint8_t* dense, const uint8_t* query_magnitude);

 private:
  int64_t n_blocks() const { return dropped_blocks_ + static_cast<int64_t>(pages_.size()); }
  int64_t dense_tokens() const { return length_ - compressed(); }
  DenseBuffer new_dense(int32_t capacity) const;
  KVMemory new_query_magnitude() const;  // zeros
  SequenceStep view_of(const DenseBuffer& dense) const;
  void refresh_page_table();
  void prepare_page_table(PendingAppend& pending) const;

  Backend* backend_;
  std::shared_ptr<BlockPool> pool_;
  std::shared_ptr<KVBudget> budget_;
  std::shared_ptr<const CacheSpec> spec_;
  std::vector<PageRef> pages_;
  std::vector<const uint8_t*> page_addresses_;  // host
  KVMemory page_table_;       // the same on the device, where it needs its own; with room for more
  int64_t table_start_ = 0;   // address in page_table_ that is the first of pages_
  DenseBuffer dense_;         // none while no token is dense
  KVMemory query_magnitude_;  // none until the first token
  int64_t length_ = 0;
  int64_t dropped_blocks_ = 0;  // of the store, before pages_
  bool long_rope_ = false;
};

}  // namespace mustafar
