// Runs the attention kernels over RandomCache sequences (tests/support/kv_test_util.h).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/attention.h"
#include "device_memory.h"
#include "support/kv_test_util.h"

namespace mustafar::cuda {

inline std::vector<float> random_queries(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> q(n);
  for (float& x : q) x = testing::random_normal(random);
  return q;
}

// Tables of coded rows in device memory.
class DeviceCodes {
 public:
  // codes: host memory; n_dims: of all layers and KV heads.
  DeviceCodes(const CodeTables& codes, int64_t n_dims)
      : k_widths_(std::vector<uint8_t>(codes.k_widths, codes.k_widths + n_dims)),
        v_widths_(std::vector<uint8_t>(codes.v_widths, codes.v_widths + n_dims)),
        k_sigmas_(std::vector<float>(codes.k_sigmas, codes.k_sigmas + n_dims)),
        v_sigmas_(std::vector<float>(codes.v_sigmas, codes.v_sigmas + n_dims)) {}

  CodeTables tables() const {
    return {k_widths_.device(), v_widths_.device(), k_sigmas_.device(), v_sigmas_.device()};
  }

 private:
  DeviceArray<uint8_t> k_widths_, v_widths_;
  DeviceArray<float> k_sigmas_, v_sigmas_;
};

// A cache as it is now, in device memory: its pages in reverse, so that none follows its
// predecessor.
class DeviceCache {
 public:
  explicit DeviceCache(testing::RandomCache& cache)
      : step_(cache.step()),
        pages_(cache.layout().page_bytes * step_.n_blocks + kSlabSlack, "the pages"),
        table_(int64_t{step_.n_blocks}, "the page table"),
        dense_(dtype_bytes(cache.shape().tail, int64_t{cache.shape().n_layers} * 2 *
                                                   cache.shape().n_kv_heads * step_.dense_capacity *
                                                   cache.shape().head_dim),
               "the dense buffer") {
    const int64_t page_bytes = cache.layout().page_bytes;
    for (int32_t b = 0; b < step_.n_blocks; b++) {
      const int64_t at = (step_.n_blocks - 1 - b) * page_bytes;
      std::memcpy(pages_.host() + at, cache.page(b), page_bytes);
      table_.host()[b] = pages_.device() + at;
    }
    std::memcpy(dense_.host(), step_.dense, dense_.bytes());
    pages_.upload();
    table_.upload();
    dense_.upload();
    if (step_.codes.k_widths != nullptr) {
      const testing::CacheShape& shape = cache.shape();
      codes_.emplace(step_.codes, int64_t{shape.n_layers} * shape.n_kv_heads * shape.head_dim);
    }
  }

  // Of the step as it was; its transform, if any, already names device memory.
  SequenceView view() const {
    SequenceView view = step_;
    view.pages = table_.device();
    view.dense = dense_.device();
    if (codes_) view.codes = codes_->tables();
    return view;
  }

 private:
  SequenceStep step_;
  DeviceMemory pages_;
  DeviceArray<const uint8_t*> table_;
  DeviceMemory dense_;
  std::optional<DeviceCodes> codes_;
};

// One decode step, a row per cache; output and partials poisoned and guarded. fast: by the
// tensor-core kernels (which must take the layout, and merge splits), else by the plain one.
// transform: its matrices are on the device. window: AttentionArgs::window. splits_per_block: 0 is
// what the kernels choose.
inline std::vector<float> decode_attend(const std::vector<testing::RandomCache*>& caches,
                                        int32_t layer, const std::vector<float>& q, bool fast,
                                        const KVTransform& transform = {}, int32_t window = 0,
                                        int32_t splits_per_block = 0) {
  const testing::CacheShape& shape = caches[0]->shape();
  std::vector<std::unique_ptr<DeviceCache>> copies;
  std::vector<SequenceView> sequences;
  AttentionArgs args;
  for (size_t i = 0; i < caches.size(); i++) {
    SequenceStep& step = caches[i]->step();
    step.row0 = static_cast<int32_t>(i);
    step.transform = transform;
    copies.push_back(std::make_unique<DeviceCache>(*caches[i]));
    sequences.push_back(copies.back()->view());
    args.max_splits = std::max(args.max_splits, seen_tokens(step, 0).n_splits());
    if (window > 0) {
      EXPECT_LE(seen_tokens(step, window).n_splits(), most_window_splits(window));
    }
  }
  if (window > 0) args.max_splits = std::min(args.max_splits, most_window_splits(window));
  args.window = window;
  const DeviceArray<SequenceView> views(sequences, "the sequences");
  args.sequences = views.device();
  args.n_sequences = args.n_rows = static_cast<int32_t>(caches.size());
  args.layout = caches[0]->layout();
  args.splits_per_block = splits_per_block;
  args.tail_dtype = shape.tail;
  args.layer = layer;
  args.n_kv_heads = shape.n_kv_heads;
  args.n_heads = shape.n_kv_heads * shape.n_queries;
  args.head_dim = shape.head_dim;
  const DeviceArray<float> queries(q, "the queries");
  DeviceArray<float> out(static_cast<int64_t>(q.size()), "the output");
  DeviceArray<float> partials(
      int64_t{args.n_rows} * args.n_heads * args.max_splits * (args.head_dim + 2), "the partials");
  args.q = queries.device();
  args.partials = partials.device();
  args.out = out.device();
  if (fast) {
    EXPECT_TRUE(decode_attention_fast(args, nullptr));
  } else {
    attention_plain(args, nullptr);
  }
  combine_attention(args, nullptr);
  partials.download();
  out.download();
  return {out.host(), out.host() + q.size()};
}

}  // namespace mustafar::cuda
