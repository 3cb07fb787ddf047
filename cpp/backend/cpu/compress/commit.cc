#include "backend/cpu/compress/commit.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "backend/cpu/attention/coded_kernels.h"
#include "backend/cpu/compress/commit_kernels.h"
#include "core/dtype.h"
#include "format/pack.h"
#include "format/prune.h"
#include "mustafar/error.h"
#include "mustafar/kv_config.h"

namespace mustafar {
namespace {

DenseRun run_of(const CommitStep& step, int32_t layer, int32_t kind, int32_t head,
                int64_t row_bytes) {
  return dense_run(step.sequence, step.dense_tokens, layer, kind, step.layout->n_kv_heads, head,
                   row_bytes);
}

// Scratch of one worker.
struct Block {
  std::vector<float> rows;          // [64][head_dim]
  std::vector<float> keys;          // [64][head_dim], where a V policy ranks by them
  std::vector<float> weight;        // [head_dim]
  std::vector<float> token_weight;  // [64]
  std::vector<uint32_t> masks;      // [64][mask_words]
};

void load_rows(const DenseRun& run, int64_t first, int32_t head_dim, DType dtype,
               std::vector<float>& rows) {
  rows.resize(size_t{kBlockTokens} * head_dim);
  for (int32_t t = 0; t < kBlockTokens; t++) {
    const uint8_t* row = run.row(first + t);
    for (int32_t d = 0; d < head_dim; d++) rows[t * head_dim + d] = load_float(row, dtype, d);
  }
}

// Sum of |q| over the window's queries.
void query_weight(const CommitStep& step, int32_t layer, int32_t head, int32_t head_dim,
                  std::vector<float>& weight) {
  const SequenceView& sequence = step.sequence;
  weight.assign(head_dim, 0.0f);
  const float* slots = query_slots(sequence, layer, step.layout->n_kv_heads, head, head_dim);
  const int32_t n = std::min(step.end_pos, sequence.query_window);
  for (int32_t p = step.end_pos - n; p < step.end_pos; p++) {
    const float* slot = slots + int64_t{p % sequence.query_window} * head_dim;
    for (int32_t d = 0; d < head_dim; d++) weight[d] += slot[d];
  }
}

// One block of one layer, KV head and kind. Returns the first row that can't be quantised, or -1.
int32_t compress_block(const CommitStep& step, Isa isa, DType tail_dtype, int32_t layer,
                       int32_t head, int32_t kind, int32_t block, Block& work) {
  const SequenceView& sequence = step.sequence;
  const StoreLayout& layout = *step.layout;
  const bool is_key = kind == kKeys;
  const SlotLayout& slot_layout = slot_of(layout, layer, is_key);
  const int32_t head_dim = slot_layout.head_dim;
  const int64_t row_bytes = dtype_bytes(tail_dtype, head_dim);
  const int64_t first = sequence.n_sinks + int64_t{block} * kBlockTokens;
  const DenseRun run = run_of(step, layer, kind, head, row_bytes);
  uint8_t* slot = step.new_pages[block] + (is_key ? k_slot_offset(layout, layer, head)
                                                  : v_slot_offset(layout, layer, head));
  const PrunePolicy policy = step.policy(kind);
  const float* weight = is_key ? sequence.transform.k_weight : sequence.transform.v_weight;
  if (weight != nullptr) {  // [head_dim]
    weight += head_index(layer, layout.n_kv_heads, head) * head_dim;
  }
#if defined(__x86_64__)
  if (policy == PrunePolicy::kMagnitude && (weight == nullptr || slot_layout.dense) &&
      isa >= Isa::kAvx512 && packs_fast(slot_layout, tail_dtype)) {
    const uint8_t* rows[kBlockTokens];
    for (int32_t t = 0; t < kBlockTokens; t++) rows[t] = run.row(first + t);
    return pack_rows_avx512(slot_layout, tail_dtype, rows, slot);
  }
#else
  static_cast<void>(isa);
#endif
  if (slot_layout.dtype == DType::kCoded) {
    const CodeTable table = code_table(sequence.codes, layout, layer, head, is_key);
#if defined(__x86_64__)
    if (isa >= Isa::kAvx512 && packs_coded_fast(slot_layout)) {
      work.weight.resize(size_t{5} * head_dim);
      const CodeRow row = make_code_row(table, head_dim, work.weight.data());
      const uint8_t* rows[kBlockTokens];
      for (int32_t t = 0; t < kBlockTokens; t++) rows[t] = run.row(first + t);
      return pack_coded_rows_avx512(slot_layout, table.widths, row, tail_dtype, rows, slot);
    }
#endif
    load_rows(run, first, head_dim, tail_dtype, work.rows);
    return pack_coded_block(slot_layout, table, work.rows.data(), slot);
  }
  load_rows(run, first, head_dim, tail_dtype, work.rows);
  if (needs_queries(policy) && !slot_layout.dense) {
    if (sequence.query_magnitude == nullptr) {
      throw StateError(
          "this pruning policy needs the window's query magnitudes, which were not "
          "recorded");
    }
    query_weight(step, layer, head, head_dim, work.weight);
    if (weight != nullptr && is_key) {
      for (int32_t d = 0; d < head_dim; d++) work.weight[d] *= weight[d];
    }
    weight = work.weight.data();
  }

  work.masks.resize(size_t{kBlockTokens} * slot_layout.mask_words);
  uint32_t* masks = work.masks.data();
  if (slot_layout.dense) {
    masks = nullptr;
  } else if (policy == PrunePolicy::kMagnitude || policy == PrunePolicy::kOutputAware) {
    for (int32_t t = 0; t < kBlockTokens; t++) {
      select_row(slot_layout, work.rows.data() + t * head_dim, weight,
                 masks + t * slot_layout.mask_words);
    }
  } else if (policy == PrunePolicy::kChannelMagnitude) {
    select_per_channel(slot_layout, work.rows.data(), nullptr, masks);
  } else if (policy == PrunePolicy::kChannelStructured) {
    select_whole_channels(slot_layout, work.rows.data(), weight, masks);
  } else if (is_key) {
    select_in_block(slot_layout, work.rows.data(), weight, masks);
  } else {
    load_rows(run_of(step, layer, kKeys, head, row_bytes), first, head_dim, tail_dtype, work.keys);
    work.token_weight.assign(kBlockTokens, 0.0f);
    for (int32_t t = 0; t < kBlockTokens; t++) {
      for (int32_t d = 0; d < head_dim; d++) {
        work.token_weight[t] += weight[d] * std::fabs(work.keys[t * head_dim + d]);
      }
    }
    select_per_channel(slot_layout, work.rows.data(), work.token_weight.data(), masks);
  }

  return pack_block(slot_layout, work.rows.data(), masks, slot);
}

// Sinks, then what follows the new blocks, to dense_out.
void move_rest(const CommitStep& step, DType tail_dtype, int32_t layer, int32_t kind,
               int32_t head) {
  const SequenceView& sequence = step.sequence;
  const StoreLayout& layout = *step.layout;
  const int64_t row_bytes = dtype_bytes(tail_dtype, layout.k.head_dim);
  const DenseRun run = run_of(step, layer, kind, head, row_bytes);
  uint8_t* out = step.dense_out +
                 dense_offset(out_capacity(step), layer, kind, layout.n_kv_heads, head, row_bytes);
  const int64_t total = int64_t{step.dense_tokens} + step.fresh_tokens;
  const int64_t sinks = std::min<int64_t>(sequence.n_sinks, total);
  const int64_t stored = int64_t{step.n_new_blocks} * kBlockTokens;

  // Rows [from, to) of the run to row `at` of out; the part still in dense may overlap it.
  const auto move = [&](int64_t from, int64_t to, int64_t at) {
    const int64_t cut = std::clamp<int64_t>(run.dense_tokens, from, to);
    if (cut > from && out + at * row_bytes != run.row(from)) {
      std::memmove(out + at * row_bytes, run.row(from), (cut - from) * row_bytes);
    }
    if (to > cut) {
      std::memcpy(out + (at + cut - from) * row_bytes, run.row(cut), (to - cut) * row_bytes);
    }
  };
  move(0, sinks, 0);
  move(sinks + stored, total, sinks);
}

}  // namespace

void commit_blocks(ThreadPool& pool, Isa isa, DType tail_dtype, std::span<const CommitStep> steps,
                   int32_t first_layer, int32_t n_layers) {
  std::vector<Block> blocks(pool.size());
  for (const CommitStep& step : steps) {
    if (step.n_new_blocks == 0) continue;
    const int32_t heads = step.layout->n_kv_heads;
    const int64_t per_layer = int64_t{step.n_new_blocks} * heads * 2;
    pool.parallel_for(per_layer * n_layers, [&](int64_t i, int worker) {
      const int32_t layer = first_layer + static_cast<int32_t>(i / per_layer);
      const int32_t block = static_cast<int32_t>(i % per_layer / (heads * 2));
      const int32_t head = static_cast<int32_t>(i / 2 % heads);
      const int32_t kind = static_cast<int32_t>(i % 2);
      if (step.new_pages[block] == nullptr) return;
      const int32_t bad =
          compress_block(step, isa, tail_dtype, layer, head, kind, block, blocks[worker]);
      if (bad < 0) return;
      const int64_t index = step.sequence.n_sinks + int64_t{block} * kBlockTokens + bad;
      const int64_t position =
          step.end_pos - (int64_t{step.dense_tokens} + step.fresh_tokens) + index;
      throw StateError(std::string(kind == kKeys ? "key" : "value") + " of layer " +
                       std::to_string(layer) + " at position " + std::to_string(position) +
                       " is not finite and can't be stored as " +
                       dtype_name((kind == kKeys ? step.layout->k : step.layout->v).dtype) +
                       "; use a float value_dtype");
    });
  }
  for (const CommitStep& step : steps) {
    const bool in_place = step.dense_out == step.sequence.dense;
    if (in_place && step.n_new_blocks == 0 && step.fresh_tokens == 0) continue;
    const int32_t heads = step.layout->n_kv_heads;
    pool.parallel_for(int64_t{heads} * n_layers, [&](int64_t i, int) {
      const int32_t layer = first_layer + static_cast<int32_t>(i / heads);
      const int32_t head = static_cast<int32_t>(i % heads);
      move_rest(step, tail_dtype, layer, kKeys, head);
      move_rest(step, tail_dtype, layer, kValues, head);
    });
  }
}

void record_query_magnitude(const SequenceView& step, int32_t layer, int32_t n_heads,
                            int32_t n_kv_heads, int32_t head_dim, const float* q) {
  if (step.query_magnitude == nullptr || step.query_window <= 0) return;
  const int32_t group = n_heads / n_kv_heads;
  for (int32_t r = std::max(0, step.n_rows - step.query_window); r < step.n_rows; r++) {
    const int32_t slot = (step.pos0 + r) % step.query_window;
    for (int32_t head = 0; head < n_kv_heads; head++) {
      float* out = query_slots(step, layer, n_kv_heads, head, head_dim) + int64_t{slot} * head_dim;
      const float* x = q + (int64_t{r} * n_heads + int64_t{head} * group) * head_dim;
      for (int32_t d = 0; d < head_dim; d++) {
        float sum = 0.0f;
        for (int32_t g = 0; g < group; g++) sum += std::fabs(x[g * head_dim + d]);
        out[d] = sum;
      }
    }
  }
}

}  // namespace mustafar
