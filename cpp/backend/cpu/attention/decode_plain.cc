// The plain path of decode attention, the reference of every faster one: a tile's rows are expanded
// to f32 and attended with one online softmax.
#include <cmath>
#include <cstring>

#include "backend/cpu/attention/decode_kernels.h"
#include "format/pack.h"

namespace mustafar {
namespace {

// Keys and values of a tile in f32. Returns its number of tokens.
int32_t expand_tile(const DecodeRun& run, int32_t tile, float* k, float* v) {
  if (tile < run.sequence->n_blocks) {
    const uint8_t* page = run.sequence->pages[tile];
    if (is_coded(run)) {
      unpack_coded_slot(*run.k_slot, run.k_codes, page + run.k_offset, k);
      unpack_coded_slot(*run.v_slot, run.v_codes, page + run.v_offset, v);
      return kBlockTokens;
    }
    unpack_slot(*run.k_slot, page + run.k_offset, k);
    unpack_slot(*run.v_slot, page + run.v_offset, v);
    return kBlockTokens;
  }
  const DenseTile dense = dense_tile(run, tile);
  for (int32_t i = 0; i < dense.n * run.head_dim; i++) {
    k[i] = load_float(dense.k, run.tail_dtype, i);
    v[i] = load_float(dense.v, run.tail_dtype, i);
  }
  return dense.n;
}

// Rows [first, n) of a tile into the running softmax of one query.
void attend_tile(const DecodeRun& run, int32_t query, int32_t first, int32_t n, const float* k,
                 const float* v) {
  const int32_t head_dim = run.head_dim;
  const float* q = run.q + int64_t{query} * head_dim;
  float* o = run.o + int64_t{query} * head_dim;
  float scores[kTileTokens];
  float max = run.max[query];
  for (int32_t t = first; t < n; t++) {
    float dot = 0.0f;
    for (int32_t d = 0; d < head_dim; d++) dot += q[d] * k[t * head_dim + d];
    scores[t] = dot * run.q_scale;
    if (scores[t] > max) max = scores[t];
  }
  const float shift = max == -INFINITY ? 0.0f : max;
  const float rescale = std::exp2(run.max[query] - shift);
  run.max[query] = max;
  run.sum[query] *= rescale;
  for (int32_t d = 0; d < head_dim; d++) o[d] *= rescale;
  for (int32_t t = first; t < n; t++) {
    const float p = std::exp2(scores[t] - shift);
    run.sum[query] += p;
    for (int32_t d = 0; d < head_dim; d++) o[d] += p * v[t * head_dim + d];
  }
}

}  // namespace

void decode_run_plain(const DecodeRun& run) {
  float* k = reinterpret_cast<float*>(run.scratch);
  float* v = k + int64_t{kTileTokens} * run.head_dim;
  for (int32_t i = 0; i < run.n_queries; i++) {
    run.max[i] = -INFINITY;
    run.sum[i] = 0.0f;
  }
  std::memset(run.o, 0, sizeof(float) * run.n_queries * run.head_dim);
  for (int32_t tile = run.first_tile; tile < run.first_tile + run.n_tiles; tile++) {
    const int32_t n = expand_tile(run, tile, k, v);
    const int32_t first = tile == 0 ? run.hidden_rows : 0;
    for (int32_t i = 0; i < run.n_queries; i++) attend_tile(run, i, first, n, k, v);
  }
}

}  // namespace mustafar
