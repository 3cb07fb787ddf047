// Runs the attention kernels over RandomCache sequences (tests/cpp/kv_test_util.h).
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "cuda/attention.h"
#include "cuda/step_views.h"
#include "kv_test_util.h"
#include "simt.h"

namespace mustafar::cuda {

inline std::vector<float> random_queries(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> q(n);
  for (float& x : q) x = testing::random_normal(random);
  return q;
}

// One decode step, a row per cache; output and partials poisoned and guarded. fast: by the
// tensor-core kernels (which must take the layout), else by the plain one.
inline std::vector<float> decode_attend(const std::vector<testing::RandomCache*>& caches,
                                        int32_t layer, const std::vector<float>& q, bool fast,
                                        const KVTransform* transform = nullptr) {
  const testing::CacheShape& shape = caches[0]->shape();
  std::vector<SequenceView> views;
  AttentionArgs args;
  for (size_t i = 0; i < caches.size(); i++) {
    SequenceStep& step = caches[i]->step();
    step.row0 = static_cast<int32_t>(i);
    step.transform = transform;
    views.push_back(view_of(step));
    args.max_splits = std::max(args.max_splits, n_decode_splits(step.n_blocks, step.dense_tokens));
  }
  args.sequences = views.data();
  args.n_sequences = args.n_rows = static_cast<int32_t>(caches.size());
  args.layout = caches[0]->layout();
  args.tail_dtype = shape.tail;
  args.layer = layer;
  args.n_kv_heads = shape.n_kv_heads;
  args.n_heads = shape.n_kv_heads * shape.n_queries;
  args.head_dim = shape.head_dim;
  simt::GuardedMemory q_memory(q.size() * 4), out(q.size() * 4);
  simt::GuardedMemory partials(int64_t{args.n_rows} * args.n_heads * args.max_splits *
                               (args.head_dim + 2) * 4);
  std::memcpy(q_memory.data(), q.data(), q.size() * 4);
  std::memset(partials.data(), 0xff, partials.bytes());
  std::memset(out.data(), 0xff, out.bytes());
  args.q = reinterpret_cast<const float*>(q_memory.data());
  args.partials = reinterpret_cast<float*>(partials.data());
  args.out = reinterpret_cast<float*>(out.data());
  if (fast) {
    EXPECT_TRUE(decode_attention_fast(args, nullptr));
  } else {
    attention_plain(args, nullptr);
  }
  combine_attention(args, nullptr);
  partials.check("partials");
  out.check("output");
  std::vector<float> result(q.size());
  std::memcpy(result.data(), out.data(), out.bytes());
  return result;
}

}  // namespace mustafar::cuda
