// Attention in f32 over any layout: rows are expanded to shared memory, then dense arithmetic. The
// production path of what the tensor-core kernels do not take, and their check.
//
// Grid: x split (decode) or chunk of pairs (prefill), y KV head, z (sequence, and in decode its
// chunk of pairs). A pair is one query row and query head of the KV head's group; a block takes
// kPairs of them, each with its own causal limit and window, through tiles of kTokens tokens.
// Tokens run store, dense buffer, fresh, but for those before every pair's window. Threads: scores,
// one (pair, token) after another; output, one dim each.
//
// Shared, f32: K and V tiles [kTokens][D + 1], queries [kPairs][D], scores [kPairs][kTokens],
// softmax state; tables of coded rows [2][D], two words each. Limit: head_dim <= 256 (77 KiB).
#include "cuda/attention.h"
#include "cuda/device_ops.cuh"
#include "cuda/launch.cuh"
#include "cuda/unpack.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kPairs = 8;
constexpr int kTokens = 32;
constexpr int kThreads = 128;
constexpr int kDimsPerThread = 2;  // head_dim <= 256

struct Scratch {
  float* keys;        // [kTokens][stride]
  float* values;      // [kTokens][stride]
  float* queries;     // [kPairs][head_dim]
  float* scores;      // [kPairs][kTokens]
  float* max;         // [kPairs]
  float* sum;         // [kPairs]
  float* rescale;     // [kPairs]
  CodeDim* codes[2];  // [head_dim], of K and V where they are coded
  int stride;
};

// A tile's rows of one kind, store tokens first, then dense ++ fresh, from what is seen on.
__device__ void load_rows(const AttentionArgs& args, const SequenceView& s, const SeenTokens& seen,
                          const DenseRun& run, int kind, int kv_head, int32_t first, int32_t n,
                          const CodeDim* codes, float* out, int stride) {
  const SlotLayout& slot = kind == kKeys ? args.layout.k : args.layout.v;
  const int64_t at = kind == kKeys ? k_slot_offset(args.layout, args.layer, kv_head)
                                   : v_slot_offset(args.layout, args.layer, kv_head);
  const int32_t stored = seen.n_blocks * kBlockTokens;
  for (int t = static_cast<int>(threadIdx.x) / kWarpSize; t < n; t += kThreads / kWarpSize) {
    const int32_t token = first + t;
    float* row = out + t * stride;
    if (token < stored) {
      unpack_row(slot, s.pages[seen.first_block + token / kBlockTokens] + at, codes,
                 token % kBlockTokens, row);
    } else {
      const uint8_t* from = run.row(seen.first_row + token - stored);
      for (int d = lane_id(); d < args.head_dim; d += kWarpSize) {
        row[d] = load_element(from, args.tail_dtype, d);
      }
    }
  }
}

// What the rows of a prompt from `position` on see: tiles begin where they would without a window.
__device__ SeenTokens seen_from(const SequenceView& s, int32_t window, int32_t position) {
  SeenTokens seen;
  seen.n_blocks = s.n_blocks;
  if (window > 0) {
    const HiddenRows hidden = hidden_before(s, position - window + 1);
    seen.first_block = hidden.store / kBlockTokens;
    seen.n_blocks -= seen.first_block;
    seen.first_row = hidden.dense / kTokens * kTokens;
  }
  return seen;
}

__global__ void __launch_bounds__(kThreads, 4) attention_plain_kernel(AttentionArgs args) {
  const int heads_per_kv = args.n_heads / args.n_kv_heads;
  const int decode_chunks = (heads_per_kv + kPairs - 1) / kPairs;
  const int32_t z = static_cast<int32_t>(blockIdx.z);
  const SequenceView& s = args.sequences[args.decode ? z / decode_chunks : z];
  const int32_t first_pair =
      kPairs * (args.decode ? z % decode_chunks : static_cast<int32_t>(blockIdx.x));
  const int32_t all_pairs = s.n_rows * heads_per_kv;
  if (first_pair >= all_pairs) return;
  const int n_pairs = all_pairs - first_pair < kPairs ? all_pairs - first_pair : kPairs;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int head_dim = args.head_dim;

  // Tokens before those of the call, then how many of those a row sees.
  const auto position = [&](int32_t pair) { return s.pos0 + pair / heads_per_kv; };
  const SeenTokens seen =
      args.decode ? seen_tokens(s, args.window) : seen_from(s, args.window, position(first_pair));
  const int32_t stored = seen.n_blocks * kBlockTokens;
  const int32_t before = stored + s.dense_tokens - seen.first_row;
  const auto visible = [&](int32_t pair) {
    return args.decode ? before + 1 : before + position(pair) - s.fresh_pos0 + 1;
  };
  const auto hides = [&](int32_t pair, int32_t token) {
    const HiddenRows hidden = hidden_before(s, position(pair) - args.window + 1);
    return token < stored ? token + seen.first_block * kBlockTokens < hidden.store
                          : token - stored + seen.first_row < hidden.dense;
  };
  int32_t first_token = 0;
  int32_t last_token = visible(first_pair + n_pairs - 1);
  const int32_t split = args.decode ? static_cast<int32_t>(blockIdx.x) : 0;
  if (args.decode) {
    const int32_t n_tiles = seen.n_tiles(), n_splits = seen.n_splits();
    if (split >= n_splits) return;
    first_token = split_begin(split, n_splits, n_tiles) * kBlockTokens;
    const int32_t end = split_begin(split + 1, n_splits, n_tiles) * kBlockTokens;
    if (end < last_token) last_token = end;
  }

  Scratch w;
  w.stride = head_dim + 1;
  w.keys = reinterpret_cast<float*>(shared_memory());
  w.values = w.keys + kTokens * w.stride;
  w.queries = w.values + kTokens * w.stride;
  w.scores = w.queries + kPairs * head_dim;
  w.max = w.scores + kPairs * kTokens;
  w.sum = w.max + kPairs;
  w.rescale = w.sum + kPairs;
  w.codes[0] = reinterpret_cast<CodeDim*>(w.rescale + kPairs);
  w.codes[1] = w.codes[0] + head_dim;
  const float scale = kLog2E / sqrtf(static_cast<float>(head_dim));
  const auto query_row = [&](int pair) {
    const int32_t row = s.row0 + (first_pair + pair) / heads_per_kv;
    const int32_t head = kv_head * heads_per_kv + (first_pair + pair) % heads_per_kv;
    return int64_t{row} * args.n_heads + head;
  };
  for (int i = thread; i < n_pairs * head_dim; i += kThreads) {
    w.queries[i] = args.q[query_row(i / head_dim) * head_dim + i % head_dim] * scale;
  }
  for (int kind = 0; kind < 2; kind++) {
    const SlotLayout& slot = kind == kKeys ? args.layout.k : args.layout.v;
    if (slot.dtype != DType::kCoded || thread / kWarpSize != kind) continue;
    load_code_dims(code_table(s.codes, args.layout, args.layer, kv_head, kind == kKeys), head_dim,
                   w.codes[kind]);
  }
  if (thread < kPairs) {
    w.max[thread] = -INFINITY;
    w.sum[thread] = 0.0f;
  }
  float out[kPairs][kDimsPerThread] = {};

  // In decode the new token is in the dense buffer, in prefill the call's tokens are in fresh.
  const int32_t dense_tokens = s.dense_tokens + (args.decode ? 1 : 0);
  const int64_t row_bytes = head_dim * (args.tail_dtype == DType::kF32 ? 4 : 2);
  const DenseRun key_run =
      dense_run(s, dense_tokens, args.layer, kKeys, args.n_kv_heads, kv_head, row_bytes);
  const DenseRun value_run =
      dense_run(s, dense_tokens, args.layer, kValues, args.n_kv_heads, kv_head, row_bytes);

  for (int32_t first = first_token; first < last_token; first += kTokens) {
    const int n = last_token - first < kTokens ? last_token - first : kTokens;
    sync_block();  // all are done with the last tile
    load_rows(args, s, seen, key_run, kKeys, kv_head, first, n, w.codes[0], w.keys, w.stride);
    load_rows(args, s, seen, value_run, kValues, kv_head, first, n, w.codes[1], w.values, w.stride);
    sync_block();
    for (int i = thread; i < n_pairs * kTokens; i += kThreads) {
      const int pair = i / kTokens, t = i % kTokens;
      float score = -INFINITY;
      if (t < n && first + t < visible(first_pair + pair) &&
          !(args.window > 0 && hides(first_pair + pair, first + t))) {
        score = 0.0f;
        const float* q = w.queries + pair * head_dim;
        const float* k = w.keys + t * w.stride;
        for (int d = 0; d < head_dim; d++) score += q[d] * k[d];
      }
      w.scores[i] = score;
    }
    sync_block();
    for (int pair = thread / kWarpSize; pair < n_pairs; pair += kThreads / kWarpSize) {
      const float score = w.scores[pair * kTokens + lane_id()];
      const float old_max = w.max[pair];
      const float max = fmaxf(warp_max(score), old_max);
      const float shift = max == -INFINITY ? 0.0f : max;
      const float p = exp2f(score - shift);
      const float sum = warp_sum(p);
      w.scores[pair * kTokens + lane_id()] = p;
      sync_warp();
      if (lane_id() == 0) {
        const float rescale = exp2f(old_max - shift);
        w.max[pair] = max;
        w.rescale[pair] = rescale;
        w.sum[pair] = w.sum[pair] * rescale + sum;
      }
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < kDimsPerThread; i++) {
      const int d = thread + i * kThreads;
      if (d >= head_dim) continue;
#pragma unroll
      for (int pair = 0; pair < kPairs; pair++) {
        if (pair >= n_pairs) continue;
        float value = out[pair][i] * w.rescale[pair];
        for (int t = 0; t < n; t++) {
          // A token out of a row's sight may hold anything.
          const float p = w.scores[pair * kTokens + t];
          if (p != 0.0f) value += p * w.values[t * w.stride + d];
        }
        out[pair][i] = value;
      }
    }
  }
  sync_block();

  for (int pair = 0; pair < n_pairs; pair++) {
    float* partial = args.partials + (query_row(pair) * args.max_splits + split) * (head_dim + 2);
#pragma unroll
    for (int i = 0; i < kDimsPerThread; i++) {
      const int d = thread + i * kThreads;
      float value = 0.0f;
#pragma unroll
      for (int j = 0; j < kPairs; j++) value = j == pair ? out[j][i] : value;
      if (d < head_dim) partial[d] = value;
    }
    if (thread == 0) {
      partial[head_dim] = w.max[pair];
      partial[head_dim + 1] = w.sum[pair];
    }
  }
}

}  // namespace

void attention_plain(const AttentionArgs& args, Stream stream) {
  const int64_t heads_per_kv = args.n_heads / args.n_kv_heads;
  const bool coded = args.layout.k.dtype == DType::kCoded || args.layout.v.dtype == DType::kCoded;
  const int64_t shared = 4 * (2 * kTokens * (int64_t{args.head_dim} + 1) +
                              kPairs * int64_t{args.head_dim} + kPairs * kTokens + 3 * kPairs) +
                         (coded ? 2 * args.head_dim * int64_t{sizeof(CodeDim)} : 0);
  const int64_t decode_chunks = (heads_per_kv + kPairs - 1) / kPairs;
  const int64_t prefill_chunks = (int64_t{args.max_row_count} * heads_per_kv + kPairs - 1) / kPairs;
  const Grid grid = args.decode
                        ? Grid{args.max_splits, args.n_kv_heads, args.n_sequences * decode_chunks}
                        : Grid{prefill_chunks, args.n_kv_heads, args.n_sequences};
  launch("attention_plain", attention_plain_kernel, grid, kThreads, shared, stream, args);
}

}  // namespace mustafar::cuda
