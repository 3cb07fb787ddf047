// Rotary embedding with append, and the KV transform: of a row a block in f32, or of many rows a
// block with the matrix on tensor cores.
#include <type_traits>

#include "cuda/device_ops.cuh"
#include "cuda/elementwise.h"
#include "cuda/launch.cuh"
#include "cuda/row_transform.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

// To about 2e-7 for angles up to 1e6. The angle is reduced in half turns, its product with 1 / pi
// in two floats: cosf and sinf would bring a table in local memory for angles beyond 1e5.
__device__ void cos_sin(float angle, float& cosine, float& sine) {
  constexpr float kInversePi = 0.318309873f, kInversePiRest = 1.28412766e-8f;
  const float turns = multiply_rounded(angle, kInversePi);
  const float rest = fmaf(angle, kInversePiRest, fmaf(angle, kInversePi, -turns));
  cos_sin_pi(turns - 2.0f * rintf(0.5f * turns) + rest, cosine, sine);
}

// A head of RopeArgs: queries first, then keys, then values.
struct RopeHead {
  int kind;  // 0: query, 1: key, 2: value
  int head, kv_head;

  __device__ RopeHead(const RopeArgs& args, int index)
      : kind(index < args.n_heads                     ? 0
             : index < args.n_heads + args.n_kv_heads ? 1
                                                      : 2),
        head(kind == 0 ? index : (index - args.n_heads) % args.n_kv_heads),
        kv_head(kind == 0 ? head / (args.n_heads / args.n_kv_heads) : head) {}

  __device__ bool rotates(const RopeArgs& args) const { return kind != 2 && args.rotates; }
  __device__ float scale(const RopeArgs& args) const { return kind == 0 ? args.query_scale : 1.0f; }
  __device__ const float* from(const RopeArgs& args, int64_t row) const {
    return kind == 0
               ? args.q + (row * args.n_heads + head) * args.head_dim
               : (kind == 1 ? args.k : args.v) + (row * args.n_kv_heads + head) * args.head_dim;
  }
  // The matrix of the KV transform, or null: keys and values are multiplied by F, queries by the
  // transpose of the keys' B.
  __device__ const float* matrix(const RopeArgs& args, const SequenceView& s) const {
    const KVTransform& transform = s.transform;
    const float* const first = kind == 0   ? transform.k_backward
                               : kind == 1 ? transform.k_forward
                                           : transform.v_forward;
    if (first == nullptr) return nullptr;
    return first + head_index(args.layer, args.n_kv_heads, kv_head) * args.head_dim * args.head_dim;
  }
  // Where a row goes, in place or where the sequence's new tokens lie, and as what.
  __device__ void* to(const RopeArgs& args, const SequenceView& s, int64_t row) const {
    if (kind == 0) return args.q + (row * args.n_heads + head) * args.head_dim;
    const int64_t row_bytes = args.head_dim * (args.tail_dtype == DType::kF32 ? 4 : 2);
    // kind - 1 is kKeys or kValues; written as a choice between them, what follows is compiled
    // twice.
    return new_row(s, args.layer, kind - 1, args.n_kv_heads, head, s.pos0 + row - s.row0,
                   row_bytes);
  }
  __device__ DType to_dtype(const RopeArgs& args) const {
    return kind == 0 ? DType::kF32 : args.tail_dtype;
  }
  // Groups that the dims of a row without a matrix are dealt to.
  __device__ int groups(const SequenceView& s) const {
    return kind == 2 ? s.transform.v_groups : s.transform.k_groups;
  }
};

// A row of a head: what its sequence says of it.
struct RopeRow {
  const float* matrix = nullptr;
  const float* from;
  void* to = nullptr;  // null: no sequence has the row
  const float* frequencies;
  float position;
  int groups;

  RopeRow() = default;
  __device__ RopeRow(const RopeArgs& args, const RopeHead& head, const SequenceView& s, int64_t row)
      : matrix(head.matrix(args, s)),
        from(head.from(args, row)),
        to(head.to(args, s, row)),
        frequencies(s.long_rope != 0 && args.long_frequencies != nullptr ? args.long_frequencies
                                                                         : args.frequencies),
        position(static_cast<float>(s.pos0 + row - s.row0)),
        groups(head.groups(s)) {}
};

// Two dims of a row that RoPE turns together: i and i + rope_dims / 2, then neighbours.
struct DimPair {
  int first, second;
  float a, b;  // their values

  DimPair() = default;
  __device__ __forceinline__ DimPair(const RopeArgs& args, const float* from, int i)
      : first(i < args.rope_dims / 2 ? i : 2 * i),
        second(i < args.rope_dims / 2 ? i + args.rope_dims / 2 : 2 * i + 1),
        a(from[first]),
        b(from[second]) {}

  // The i-th pair as it is stored: rotated where RoPE does so, queries scaled.
  __device__ __forceinline__ void turn(const RopeArgs& args, const RopeHead& head,
                                       const RopeRow& row, int i) {
    if (i < args.rope_dims / 2 && head.rotates(args)) {
      float cosine, sine;
      cos_sin(multiply_rounded(row.position, row.frequencies[i]), cosine, sine);
      cosine *= args.rope_scale;
      sine *= args.rope_scale;
      const float x = a;
      a = x * cosine - b * sine;
      b = b * cosine + x * sine;
    }
    a *= head.scale(args);
    b *= head.scale(args);
  }
};

// One row a block. Grid: x head, y row. Shared: the head's vector [head_dim], transform_scratch.
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeArgs args) {
  const int32_t index = static_cast<int32_t>(blockIdx.y);
  const SequenceView* const s = find_sequence(args.sequences, args.n_sequences, index);
  if (s == nullptr) return;
  const int dims = args.head_dim;
  const RopeHead head(args, static_cast<int>(blockIdx.x));
  const RopeRow row(args, head, *s, index);
  const DType dtype = head.to_dtype(args);
  float* const x = reinterpret_cast<float*>(shared_memory());
  for (int i = thread(); i < dims / 2; i += kThreads) {
    DimPair pair(args, row.from, i);
    pair.turn(args, head, row, i);
    x[pair.first] = pair.a;
    x[pair.second] = pair.b;
  }
  sync_block();
  if (row.matrix == nullptr) {
    for (int d = thread(); d < dims; d += kThreads) {
      store_element(row.to, dtype, stored_index(d, row.groups, dims), x[d]);
    }
  } else if (head.kind == 0) {
    transform_row_transposed<kThreads>(
        x, row.matrix, dims, [&](int d, float value) { store_element(row.to, dtype, d, value); });
  } else {
    transform_rows<kThreads, 1>(x, 1, row.matrix, dims, x + dims, [&](int, int d, float value) {
      store_element(row.to, dtype, d, value);
    });
  }
}

// Many rows, of whichever sequences; f16 or bf16 tail. Grid: x head, y rows. Shared: a RowBlock.
template <int kDims, int kRows>
__global__ void __launch_bounds__(kBlockThreads) rope_append_block_kernel(RopeArgs args) {
  constexpr int kPairs = kDims / 2;
  // Where the pairs of a row do not divide a block's threads, four pairs' indices would be spilled.
  constexpr int kAtOnce = kBlockThreads % kPairs == 0 ? 4 : 2;
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kRows;
  const int n = args.n_rows - first < kRows ? args.n_rows - first : kRows;
  const RopeHead head(args, static_cast<int>(blockIdx.x));
  const DType dtype = head.to_dtype(args);
  auto& rows = *reinterpret_cast<RowBlock<RopeRow, kDims, kRows>*>(shared_memory());
  rows.fill(n, [&](int r) {
    const SequenceView* const s = find_sequence(args.sequences, args.n_sequences, first + r);
    return s != nullptr ? RopeRow(args, head, *s, first + r) : RopeRow();
  });
  // Loads of some pairs before any is stored: they wait together.
  for (int start = thread(); start < n * kPairs; start += kAtOnce * kBlockThreads) {
    DimPair pairs[kAtOnce];
    const auto for_pairs = [&](auto&& body) {
#pragma unroll
      for (int at = 0; at < kAtOnce; at++) {
        const int i = start + at * kBlockThreads;
        if (i >= n * kPairs) break;
        const RopeRow& row = rows[i / kPairs];
        if (row.to != nullptr) body(pairs[at], row, i / kPairs, i % kPairs);
      }
    };
    for_pairs(
        [&](DimPair& pair, const RopeRow& row, int, int i) { pair = DimPair(args, row.from, i); });
    for_pairs([&](DimPair& pair, const RopeRow& row, int r, int i) {
      pair.turn(args, head, row, i);
      if (row.matrix == nullptr && row.groups == 1) {
        store_element(row.to, dtype, pair.first, pair.a);
        store_element(row.to, dtype, pair.second, pair.b);
      } else if (row.matrix == nullptr) {
        rows.keep(r, pair.first, pair.a);
        rows.keep(r, pair.second, pair.b);
      } else {
        rows.put(r, pair.first, pair.a);
        rows.put(r, pair.second, pair.b);
      }
    });
  }
  sync_block();
  for (int r = thread() / kWarpSize; r < n; r += kBlockThreads / kWarpSize) {
    const RopeRow& row = rows[r];
    if (row.to == nullptr || row.matrix != nullptr || row.groups == 1) continue;
    for (int d = lane_id(); d < kDims; d += kWarpSize) {
      store_element(row.to, dtype, stored_index(d, row.groups, kDims), rows.kept(r, d));
    }
  }
  const auto store = [&](int r, int d, float a, float b) { store_two(rows[r].to, dtype, d, a, b); };
  if (head.kind == 0) {
    rows.template multiply<true>(n, store);
  } else {
    rows.template multiply<false>(n, store);
  }
}

// A row of a head of attention output.
struct OutputRow {
  const float* matrix = nullptr;  // v_backward
  float* at;
};

// Rows of attention output times v_backward, in place. Grid: x head, y rows. Shared: a RowBlock.
template <int kDims, int kRows>
__global__ void __launch_bounds__(kBlockThreads) undo_values_kernel(AttentionArgs args) {
  constexpr int kFours = kDims / 4, kAtOnce = 4;
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kRows;
  const int n = args.n_rows - first < kRows ? args.n_rows - first : kRows;
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (args.n_heads / args.n_kv_heads);
  auto& rows = *reinterpret_cast<RowBlock<OutputRow, kDims, kRows>*>(shared_memory());
  rows.fill(n, [&](int r) {
    OutputRow row;
    const SequenceView* const s = find_sequence(args.sequences, args.n_sequences, first + r);
    if (s == nullptr || s->transform.v_backward == nullptr) return row;
    row.matrix =
        s->transform.v_backward + head_index(args.layer, args.n_kv_heads, kv_head) * kDims * kDims;
    row.at = args.out + (int64_t{first + r} * args.n_heads + head) * kDims;
    return row;
  });
  for (int start = thread(); start < n * kFours; start += kAtOnce * kBlockThreads) {
    float4 fours[kAtOnce];
#pragma unroll
    for (int at = 0; at < kAtOnce; at++) {
      const int i = start + at * kBlockThreads;
      if (i >= n * kFours || rows[i / kFours].matrix == nullptr) continue;
      fours[at] = *reinterpret_cast<const float4*>(rows[i / kFours].at + i % kFours * 4);
    }
#pragma unroll
    for (int at = 0; at < kAtOnce; at++) {
      const int i = start + at * kBlockThreads;
      if (i >= n * kFours || rows[i / kFours].matrix == nullptr) continue;
      rows.put_four(i / kFours, i % kFours * 4, fours[at]);
    }
  }
  sync_block();
  rows.template multiply<false>(n, [&](int r, int d, float a, float b) {
    *reinterpret_cast<float2*>(rows[r].at + d) = float2{a, b};
  });
}

// launch(constants of head_dim and of a block's rows) where there is a kernel of many rows a block:
// few rows a block where it would else be few blocks.
template <typename Launch>
bool by_blocks(int32_t head_dim, int32_t n_rows, Launch&& launch) {
  const auto of_dims = [&](auto dims) {
    if (n_rows <= 128) {
      launch(dims, std::integral_constant<int, 16>());
    } else {
      launch(dims, std::integral_constant<int, 64>());
    }
    return true;
  };
  switch (head_dim) {
    case 64:
      return of_dims(std::integral_constant<int, 64>());
    case 96:
      return of_dims(std::integral_constant<int, 96>());
    case 128:
      return of_dims(std::integral_constant<int, 128>());
    default:
      return false;
  }
}

Grid block_grid(int32_t heads, int32_t n_rows, int32_t block_rows) {
  return {heads, (n_rows + block_rows - 1) / block_rows};
}

}  // namespace

void rope_append(const RopeArgs& args, Stream stream) {
  const int32_t heads = args.n_heads + 2 * args.n_kv_heads;
  const auto many = [&](auto dims, auto rows) {
    launch("rope_append_block", rope_append_block_kernel<dims, rows>,
           block_grid(heads, args.n_rows, rows), kBlockThreads,
           sizeof(RowBlock<RopeRow, dims, rows>), stream, args);
  };
  if (args.tail_dtype != DType::kF32 && args.n_rows > kFewRows &&
      by_blocks(args.head_dim, args.n_rows, many)) {
    return;
  }
  const int floats = args.head_dim + transform_scratch(kThreads, 1, args.head_dim);
  launch("rope_append", rope_append_kernel, {heads, args.n_rows}, kThreads, floats * 4, stream,
         args);
}

bool undoes_values(int32_t head_dim) {
  return by_blocks(head_dim, 1, [](auto, auto) {});
}

void undo_value_transform(const AttentionArgs& args, Stream stream) {
  const auto many = [&](auto dims, auto rows) {
    launch("undo_values", undo_values_kernel<dims, rows>,
           block_grid(args.n_heads, args.n_rows, rows), kBlockThreads,
           sizeof(RowBlock<OutputRow, dims, rows>), stream, args);
  };
  if (!by_blocks(args.head_dim, args.n_rows, many)) {
    throw Error("no kernel undoes a value transform of this head_dim");
  }
}

}  // namespace mustafar::cuda
