// Choice of the decode kernel, the merge of its splits, and the query statistics of pruning
// policies.
#include "cuda/attention.h"
#include "cuda/decode_attention.cuh"
#include "cuda/merge_splits.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kCombineThreads = 256;

// kHeads of a KV head a block. Grid: x heads, y row. Shared: what merge_splits takes.
template <int kHeads>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(AttentionArgs args, int n_parts) {
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kHeads;
  const int32_t row = static_cast<int32_t>(blockIdx.y);
  const SequenceView* s = find_sequence(args.sequences, args.n_sequences, row);
  if (s == nullptr) return;
  const int32_t n_splits = args.decode ? seen_tokens(*s, args.window).n_splits() : 1;
  merge_splits<kCombineThreads, kHeads>(args, *s, row, first, kHeads, args.head_dim, n_splits,
                                        n_parts, reinterpret_cast<float*>(shared_memory()));
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
  float* out = query_slots(s, args.layer, args.n_kv_heads, head, args.head_dim) +
               int64_t{slot} * args.head_dim;
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
    case DType::kCoded:
      return decode_attention_coded(args, stream);
    default:
      return false;
  }
}

void combine_attention(const AttentionArgs& args, Stream stream) {
  const auto start = [&](auto kernel, int heads) {
    const int pairs = args.head_dim / 2 * heads;
    const int n_parts = pairs < kCombineThreads ? kCombineThreads / pairs : 1;
    launch("combine_attention", kernel, {args.n_heads / heads, args.n_rows}, kCombineThreads,
           merge_bytes(kCombineThreads, heads, args.head_dim, n_parts), stream, args, n_parts);
  };
  // Of many rows four heads a block, which then all run at once.
  constexpr int kSome = 4;
  const bool many =
      args.n_rows * args.n_heads > 1024 && args.n_heads / args.n_kv_heads % kSome == 0;
  if (many) {
    start(combine_kernel<kSome>, kSome);
  } else {
    start(combine_kernel<1>, 1);
  }
}

void record_query_magnitude(const AttentionArgs& args, Stream stream) {
  launch("query_magnitude", query_magnitude_kernel,
         {args.n_kv_heads, args.max_row_count, args.n_sequences}, kThreads, 0, stream, args);
}

}  // namespace mustafar::cuda
