// Choice of the decode kernel, the merge of its splits, and the query statistics of pruning
// policies.
#include "cuda/attention.h"
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSplitsAtOnce = 256;  // whose weights fit in shared memory

// Grid: x head, y row. Shared: weights [kSplitsAtOnce], then the merged output [head_dim].
__global__ void __launch_bounds__(kThreads) combine_kernel(AttentionArgs args) {
  const int32_t head = static_cast<int32_t>(blockIdx.x), row = static_cast<int32_t>(blockIdx.y);
  const SequenceView* s = find_sequence(args.sequences, args.n_sequences, row);
  if (s == nullptr) return;
  const int32_t n_splits = args.decode ? n_decode_splits(s->n_blocks, s->dense_tokens) : 1;
  const int32_t stride = args.head_dim + 2;
  const float* partials =
      args.partials + (int64_t{row} * args.n_heads + head) * args.max_splits * stride;
  float* weights = reinterpret_cast<float*>(shared_memory());
  float* merged = weights + kSplitsAtOnce;
  const int thread = static_cast<int>(threadIdx.x);

  float max = -INFINITY;
  for (int32_t i = 0; i < n_splits; i++) max = fmaxf(max, partials[i * stride + args.head_dim]);
  const float shift = max == -INFINITY ? 0.0f : max;
  float sum = 0.0f;
  for (int d = thread; d < args.head_dim; d += kThreads) merged[d] = 0.0f;
  for (int32_t first = 0; first < n_splits; first += kSplitsAtOnce) {
    const int32_t n = n_splits - first < kSplitsAtOnce ? n_splits - first : kSplitsAtOnce;
    sync_block();
    for (int i = thread; i < n; i += kThreads) {
      weights[i] = exp2_approx(partials[(first + i) * stride + args.head_dim] - shift);
    }
    sync_block();
    for (int32_t i = 0; i < n; i++) {
      sum += weights[i] * partials[(first + i) * stride + args.head_dim + 1];
    }
    for (int d = thread; d < args.head_dim; d += kThreads) {
      float value = merged[d];
      for (int32_t i = 0; i < n; i++) value += weights[i] * partials[(first + i) * stride + d];
      merged[d] = value;
    }
  }
  const float inverse = 1.0f / sum;
  for (int d = thread; d < args.head_dim; d += kThreads) merged[d] *= inverse;
  sync_block();
  float* out = args.out + (int64_t{row} * args.n_heads + head) * args.head_dim;
  const int32_t kv_head = head / (args.n_heads / args.n_kv_heads);
  for (int d = thread; d < args.head_dim; d += kThreads) {
    float value = merged[stored_index(d, s->v_groups, args.head_dim)];
    if (s->v_backward != nullptr) {
      const float* matrix = s->v_backward + (int64_t{args.layer} * args.n_kv_heads + kv_head) *
                                                args.head_dim * args.head_dim;
      value = 0.0f;
      for (int32_t j = 0; j < args.head_dim; j++)
        value += merged[j] * matrix[j * args.head_dim + d];
    }
    out[d] = value;
  }
}

// Grid: x KV head, y row, z sequence; thread d sums |q| of dim d over the group's query heads.
__global__ void __launch_bounds__(kThreads) query_magnitude_kernel(AttentionArgs args) {
  const SequenceView& s = args.sequences[blockIdx.z];
  const int32_t first = s.n_rows > s.query_window ? s.n_rows - s.query_window : 0;
  const int32_t r = first + static_cast<int32_t>(blockIdx.y);
  if (s.query_magnitude == nullptr || s.query_window <= 0 || r >= s.n_rows) return;
  const int32_t head = static_cast<int32_t>(blockIdx.x);
  const int32_t group = args.n_heads / args.n_kv_heads;
  const int32_t slot = (s.pos0 + r) % s.query_window;
  float* out =
      s.query_magnitude +
      ((int64_t{args.layer} * args.n_kv_heads + head) * s.query_window + slot) * args.head_dim;
  const float* q =
      args.q + (int64_t{s.row0 + r} * args.n_heads + int64_t{head} * group) * args.head_dim;
  for (int d = static_cast<int>(threadIdx.x); d < args.head_dim; d += kThreads) {
    float sum = 0.0f;
    for (int32_t i = 0; i < group; i++) sum = add_rounded(sum, fabsf(q[i * args.head_dim + d]));
    out[d] = sum;
  }
}

bool has_fast_layout(const AttentionArgs& args) {
  const SlotLayout& k = args.layout.k;
  const SlotLayout& v = args.layout.v;
  const bool half_tail = args.tail_dtype == DType::kF16 || args.tail_dtype == DType::kBF16;
  const bool values = k.dtype == v.dtype && (k.dtype == args.tail_dtype || has_scales(k.dtype));
  return half_tail && values && !k.ragged && !v.ragged &&
         (args.head_dim == 64 || args.head_dim == 128);
}

}  // namespace

bool decode_attention_fast(const AttentionArgs& args, Stream stream) {
  if (!has_fast_layout(args)) return false;
  switch (args.layout.k.dtype) {
    case DType::kF16:
      decode_attention_f16(args, stream);
      return true;
    case DType::kBF16:
      decode_attention_bf16(args, stream);
      return true;
    case DType::kInt8:
      decode_attention_int8(args, stream);
      return true;
    case DType::kInt4:
      decode_attention_int4(args, stream);
      return true;
    default:
      return false;
  }
}

void combine_attention(const AttentionArgs& args, Stream stream) {
  launch("combine_attention", combine_kernel, {args.n_heads, args.n_rows}, kThreads,
         (kSplitsAtOnce + args.head_dim) * 4, stream, args);
}

void record_query_magnitude(const AttentionArgs& args, Stream stream) {
  launch("query_magnitude", query_magnitude_kernel,
         {args.n_kv_heads, args.max_row_count, args.n_sequences}, kThreads, 0, stream, args);
}

}  // namespace mustafar::cuda
