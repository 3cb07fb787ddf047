#include "backend/cpu/attention/decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <numbers>
#include <vector>

#include "backend/cpu/attention/decode_kernels.h"

namespace mustafar {
namespace {

// Tiles of one run: 1024 tokens. Long enough that a run's fixed costs (preparing the queries, the
// partial result) are about a hundredth, short enough to spread a 4K context over many threads.
constexpr int32_t kRunTiles = 16;

void attend(Isa isa, DecodeRuns runs) {
  const auto one_by_one = [&](void (*function)(const DecodeRun&)) {
    for (const DecodeRun& run : runs) function(run);
  };
  if (!decode_serves(runs[0])) return one_by_one(decode_run_plain);
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return decode_runs_avx2(runs);
    case Isa::kAvx512:
      return decode_runs_avx512(runs);
    case Isa::kAvx512Bf16:
      return decode_runs_avx512bf16(runs);
    case Isa::kAmx:
      return decode_runs_amx(runs);
#elif defined(__aarch64__)
    case Isa::kNeon:
      return one_by_one(is_coded(runs[0]) ? decode_run_plain : decode_run_neon);
#endif
    default:
      return one_by_one(decode_run_plain);
  }
}

// A sequence's share of the work: runs of all its KV heads, and where their partial results go.
struct Plan {
  const SequenceStep* sequence = nullptr;  // or what a window leaves of it
  int32_t hidden_rows = 0;                 // of its first block, before the window
  int32_t first_dense = 0;                 // row of the dense buffer that is seen
  int32_t dense_tokens = 0;                // from there on, the new one included
  int32_t n_tiles = 0;
  int32_t n_runs = 0;         // per KV head
  int64_t first_partial = 0;  // [n_kv_heads][n_runs]
};

// Leaves out of a plan what lies before a window; `seen` is the sequence without whole blocks of
// it.
void hide(const SequenceStep& sequence, int32_t window, SequenceStep& seen, Plan& plan) {
  const HiddenRows hidden = hidden_before(sequence, sequence.pos0 - window + 1);
  const int32_t blocks = hidden.store / kBlockTokens;
  seen = sequence;
  seen.pages += blocks;
  seen.n_blocks -= blocks;
  plan.sequence = &seen;
  plan.hidden_rows = hidden.store % kBlockTokens;
  plan.first_dense = hidden.dense;
  plan.dense_tokens -= hidden.dense;
}

// What a thread takes at a time: one run of some neighbouring KV heads.
struct Item {
  int32_t sequence, run, first_head, n_heads;
};

// Large items first, so that memory is read in long stretches, small ones last, so that the threads
// end together: an item has at most a share of what is left.
std::vector<Item> items_of(std::span<const Plan> plans, int32_t n_kv_heads, int64_t n_partials,
                           int threads) {
  std::vector<Item> items;
  int64_t left = n_partials;
  for (size_t s = 0; s < plans.size(); s++) {
    for (int32_t run = 0; run < plans[s].n_runs; run++) {
      for (int32_t head = 0; head < n_kv_heads;) {
        const int64_t share = std::clamp<int64_t>(left / threads, 1, kMaxSpanHeads);
        const int32_t n = static_cast<int32_t>(std::min<int64_t>(share, n_kv_heads - head));
        items.push_back({static_cast<int32_t>(s), run, head, n});
        head += n;
        left -= n;
      }
    }
  }
  return items;
}

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
  std::vector<SequenceStep> seen;  // of sequences in whose cache a window begins
  int64_t n_partials = 0;
  for (size_t s = 0; s < plans.size(); s++) {
    const SequenceStep& sequence = args.sequences[s];
    Plan& plan = plans[s];
    plan.sequence = &sequence;
    plan.dense_tokens = sequence.dense_tokens + 1;
    if (const int32_t window = sequence.window(args.layer); window > 0 && sequence.pos0 >= window) {
      seen.resize(plans.size());
      hide(sequence, window, seen[s], plan);
    }
    plan.n_tiles = plan.sequence->n_blocks + (plan.dense_tokens + kTileTokens - 1) / kTileTokens;
    plan.n_runs = (plan.n_tiles + kRunTiles - 1) / kRunTiles;
    plan.first_partial = n_partials;
    n_partials += int64_t{plan.n_runs} * args.n_kv_heads;
  }
  const std::vector<Item> items = items_of(plans, args.n_kv_heads, n_partials, pool.size());

  // Scratch: per worker; then counters of ended runs; then partial results.
  const int32_t span_heads = std::min(args.n_kv_heads, kMaxSpanHeads);
  const int64_t worker_bytes =
      (decode_scratch_bytes(n_queries, args.head_dim, span_heads) + 127) / 128 * 128;
  const int64_t n_counters = static_cast<int64_t>(plans.size()) * args.n_kv_heads;
  const int64_t counters_at = worker_bytes * pool.size();
  const int64_t partials_at = (counters_at + n_counters * 4 + 127) / 128 * 128;
  const int64_t stride = partial_floats(n_queries, args.head_dim);
  scratch.ensure(partials_at + n_partials * stride * 4);
  uint8_t* const base = scratch.as<uint8_t>();
  std::atomic<int32_t>* ended = reinterpret_cast<std::atomic<int32_t>*>(base + counters_at);
  for (int64_t i = 0; i < n_counters; i++) new (ended + i) std::atomic<int32_t>(0);
  float* const partials = reinterpret_cast<float*>(base + partials_at);

  pool.parallel_for(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
    const Item& item = items[i];
    const Plan& plan = plans[item.sequence];
    const SequenceStep& sequence = *plan.sequence;
    const int64_t row = int64_t{sequence.row0} * args.n_heads * args.head_dim;
    const int64_t head_values = int64_t{n_queries} * args.head_dim;
    const auto head_partials = [&](int32_t head) {
      return partials + (plan.first_partial + int64_t{head} * plan.n_runs) * stride;
    };

    DecodeRun runs[kMaxSpanHeads];
    for (int32_t h = 0; h < item.n_heads; h++) {
      DecodeRun& run = runs[h];
      const int32_t head = item.first_head + h;
      run.sequence = &sequence;
      run.n_queries = n_queries;
      run.head_dim = args.head_dim;
      run.tail_dtype = args.tail_dtype;
      run.first_tile = item.run * kRunTiles;
      run.n_tiles = std::min(kRunTiles, plan.n_tiles - run.first_tile);
      run.hidden_rows = plan.hidden_rows;
      if (sequence.n_blocks > 0) {
        run.k_slot = &slot_of(*sequence.layout, args.layer, true);
        run.v_slot = &slot_of(*sequence.layout, args.layer, false);
        run.k_offset = k_slot_offset(*sequence.layout, args.layer, head);
        run.v_offset = v_slot_offset(*sequence.layout, args.layer, head);
      }
      if (is_coded(run)) {
        const StoreLayout& layout = *sequence.layout;
        run.k_codes = code_table(sequence.codes, layout, args.layer, head, true);
        run.v_codes = code_table(sequence.codes, layout, args.layer, head, false);
      }
      const auto dense_rows = [&](int32_t kind) {
        return dense_run(sequence, sequence.dense_tokens + 1, args.layer, kind, args.n_kv_heads,
                         head, dtype_bytes(args.tail_dtype, args.head_dim))
            .row(plan.first_dense);
      };
      run.k_dense = dense_rows(kKeys);
      run.v_dense = dense_rows(kValues);
      run.dense_tokens = plan.dense_tokens;
      run.q = args.q + row + head * head_values;
      run.q_scale = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(args.head_dim));
      run.fine = args.fine || args.tail_dtype == DType::kF32;
      run.scratch = base + worker * worker_bytes;
      run.max = head_partials(head) + item.run * stride;
      run.sum = run.max + n_queries;
      run.o = run.sum + n_queries;
    }
    attend(isa, {runs, static_cast<size_t>(item.n_heads)});

    for (int32_t head = item.first_head; head < item.first_head + item.n_heads; head++) {
      std::atomic<int32_t>& count = ended[item.sequence * args.n_kv_heads + head];
      if (count.fetch_add(1, std::memory_order_acq_rel) + 1 == plan.n_runs) {
        combine(head_partials(head), plan.n_runs, n_queries, args.head_dim,
                args.out + row + head * head_values);
      }
    }
  });
}

}  // namespace mustafar
