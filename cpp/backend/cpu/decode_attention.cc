#include "backend/cpu/decode_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "backend/cpu/decode_attention_kernels.h"

namespace mustafar {
namespace {

// Tiles of one run: 1024 tokens. Long enough that a run's fixed costs (preparing the queries, the
// partial result) are about a hundredth, short enough to spread a 4K context over many threads.
constexpr int32_t kRunTiles = 16;

DecodeRunFunction run_function(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return decode_run_avx2;
    case Isa::kAvx512:
    case Isa::kAmx:
      return decode_run_avx512;
    case Isa::kAvx512Bf16:
      return decode_run_avx512bf16;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return decode_run_neon;
#endif
    default:
      return decode_run_plain;
  }
}

// A sequence's share of the work: runs of all its KV heads, and where their partial results go.
struct Plan {
  int32_t dense_tokens = 0;
  int32_t n_tiles = 0;
  int32_t n_runs = 0;      // per KV head
  int64_t first_item = 0;  // of the loop over all runs
};

// Partial results of one run: max, sum [n_queries] each, then o [n_queries][head_dim].
int64_t partial_floats(int32_t n_queries, int32_t head_dim) {
  return int64_t{n_queries} * (head_dim + 2);
}

// Combines the partial softmaxes of a KV head, in order. partials: [n_runs][partial_floats].
void combine(const float* partials, int32_t n_runs, int32_t n_queries, int32_t head_dim,
             float* out) {
  const int64_t stride = partial_floats(n_queries, head_dim);
  for (int32_t i = 0; i < n_queries; i++) {
    float max = -INFINITY;
    for (int32_t r = 0; r < n_runs; r++) max = std::max(max, partials[r * stride + i]);
    const float shift = max == -INFINITY ? 0.0f : max;
    float* o = out + int64_t{i} * head_dim;
    float sum = 0.0f;
    std::fill_n(o, head_dim, 0.0f);
    for (int32_t r = 0; r < n_runs; r++) {
      const float* partial = partials + r * stride;
      const float weight = std::exp2(partial[i] - shift);
      const float* part = partial + 2 * n_queries + int64_t{i} * head_dim;
      sum += weight * partial[n_queries + i];
      for (int32_t d = 0; d < head_dim; d++) o[d] += weight * part[d];
    }
    const float inverse = 1.0f / sum;
    for (int32_t d = 0; d < head_dim; d++) o[d] *= inverse;
  }
}

}  // namespace

void decode_attention(ThreadPool& pool, Isa isa, const DecodeAttentionArgs& args,
                      HostBuffer& scratch) {
  const int32_t n_queries = args.n_heads / args.n_kv_heads;
  std::vector<Plan> plans(args.sequences.size());
  int64_t n_items = 0;
  for (size_t s = 0; s < plans.size(); s++) {
    const SequenceStep& sequence = args.sequences[s];
    Plan& plan = plans[s];
    plan.dense_tokens = sequence.dense_tokens + 1;
    plan.n_tiles = sequence.n_blocks + (plan.dense_tokens + kTileTokens - 1) / kTileTokens;
    plan.n_runs = (plan.n_tiles + kRunTiles - 1) / kRunTiles;
    plan.first_item = n_items;
    n_items += int64_t{plan.n_runs} * args.n_kv_heads;
  }

  // Scratch: per worker; then counters of ended runs; then partial results.
  const int64_t worker_bytes = (decode_scratch_bytes(n_queries, args.head_dim) + 127) / 128 * 128;
  const int64_t n_counters = static_cast<int64_t>(plans.size()) * args.n_kv_heads;
  const int64_t counters_at = worker_bytes * pool.size();
  const int64_t partials_at = (counters_at + n_counters * 4 + 127) / 128 * 128;
  const int64_t stride = partial_floats(n_queries, args.head_dim);
  scratch.ensure(partials_at + n_items * stride * 4);
  uint8_t* const base = scratch.as<uint8_t>();
  std::atomic<int32_t>* ended = reinterpret_cast<std::atomic<int32_t>*>(base + counters_at);
  for (int64_t i = 0; i < n_counters; i++) new (ended + i) std::atomic<int32_t>(0);
  float* const partials = reinterpret_cast<float*>(base + partials_at);

  const DecodeRunFunction run_tiles = run_function(isa);
  pool.parallel_for(n_items, [&](int64_t item, int worker) {
    const auto after =
        std::upper_bound(plans.begin(), plans.end(), item,
                         [](int64_t value, const Plan& plan) { return value < plan.first_item; });
    const size_t s = after - plans.begin() - 1;
    const Plan& plan = plans[s];
    const SequenceStep& sequence = args.sequences[s];
    const int32_t head = static_cast<int32_t>((item - plan.first_item) / plan.n_runs);
    const int32_t index = static_cast<int32_t>((item - plan.first_item) % plan.n_runs);
    const int64_t row =
        (int64_t{sequence.row0} * args.n_heads + int64_t{head} * n_queries) * args.head_dim;
    float* partial = partials + item * stride;

    DecodeRun run;
    run.sequence = &sequence;
    run.layer = args.layer;
    run.kv_head = head;
    run.n_kv_heads = args.n_kv_heads;
    run.n_queries = n_queries;
    run.head_dim = args.head_dim;
    run.tail_dtype = args.tail_dtype;
    run.dense_tokens = plan.dense_tokens;
    run.first_tile = index * kRunTiles;
    run.n_tiles = std::min(kRunTiles, plan.n_tiles - run.first_tile);
    if (sequence.n_blocks > 0) {
      run.k_offset = k_slot_offset(*sequence.layout, args.layer, head);
      run.v_offset = v_slot_offset(*sequence.layout, args.layer, head);
    }
    run.q = args.q + row;
    run.q_scale = 1.44269504f / std::sqrt(static_cast<float>(args.head_dim));
    run.scratch = base + worker * worker_bytes;
    run.max = partial;
    run.sum = partial + n_queries;
    run.o = partial + 2 * n_queries;
    (decode_serves(run) ? run_tiles : decode_run_plain)(run);

    if (ended[s * args.n_kv_heads + head].fetch_add(1, std::memory_order_acq_rel) + 1 ==
        plan.n_runs) {
      combine(partial - index * stride, plan.n_runs, n_queries, args.head_dim, args.out + row);
    }
  });
}

}  // namespace mustafar
