// The small operations between the matrix products: embedding rows, RMSNorm, SiLU, rotary embedding
// with append, the KV transform.
#include "cuda/architectures.h"
#include "cuda/device_ops.cuh"
#include "cuda/elementwise.h"
#include "cuda/launch.cuh"
#include "cuda/row_transform.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

__global__ void __launch_bounds__(kThreads)
    embed_kernel(const void* table, DType dtype, const int32_t* token_ids, int64_t hidden,
                 float* out) {
  const int64_t row = blockIdx.x, i = int64_t{blockIdx.y} * kThreads + thread();
  if (i < hidden) {
    out[row * hidden + i] = load_element(table, dtype, token_ids[row] * hidden + i);
  }
}

// One row a block. kWidth: neighbours that a thread takes at once, 1 or 4; hidden is a multiple of
// it. Shared: a partial sum per warp.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const float* x, const int32_t* rows, const float* weight, float eps,
                    int64_t hidden, bool add, DType dtype, void* out) {
  const int64_t row = rows != nullptr ? rows[blockIdx.x] : static_cast<int64_t>(blockIdx.x);
  const float* from = x + row * hidden;
  float squares = 0.0f;
#pragma unroll 4
  for (int64_t i = thread() * kWidth; i < hidden; i += kThreads * kWidth) {
    if constexpr (kWidth == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    } else {
      squares += from[i] * from[i];
    }
  }
  float* partial = reinterpret_cast<float*>(shared_memory());
  squares = warp_sum(squares);
  if (lane_id() == 0) partial[thread() / kWarpSize] = squares;
  sync_block();
  float total = 0.0f;
  for (int w = 0; w < kWarps; w++) total += partial[w];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(hidden) + eps);
#pragma unroll 4
  for (int64_t i = thread() * kWidth; i < hidden; i += kThreads * kWidth) {
    const int64_t to = int64_t{blockIdx.x} * hidden + i;
    if constexpr (kWidth == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      const float4 w = *reinterpret_cast<const float4*>(weight + i);
      float4 value = {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
      if (add) {
        const float4 old = *reinterpret_cast<const float4*>(static_cast<const float*>(out) + to);
        value = {value.x + old.x, value.y + old.y, value.z + old.z, value.w + old.w};
      }
      store_four(out, dtype, to, value);
    } else {
      float value = from[i] * scale * weight[i];
      if (add) value += static_cast<const float*>(out)[to];
      store_element(out, dtype, to, value);
    }
  }
}

__global__ void __launch_bounds__(kThreads) scale_kernel(float* x, float factor, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + thread();
  if (i < count) x[i] *= factor;
}

// Four neighbours a thread.
__global__ void __launch_bounds__(kThreads)
    silu_multiply_kernel(const float* gate, const float* up, int64_t count, DType dtype,
                         void* out) {
  const auto silu = [](float x, float y) { return x / (1.0f + expf(-x)) * y; };
  const int64_t first = (int64_t{blockIdx.x} * kThreads + thread()) * 4;
  if (first + 4 > count) {
    for (int64_t i = first; i < count; i++) store_element(out, dtype, i, silu(gate[i], up[i]));
    return;
  }
  const float4 x = *reinterpret_cast<const float4*>(gate + first);
  const float4 y = *reinterpret_cast<const float4*>(up + first);
  store_four(out, dtype, first, {silu(x.x, y.x), silu(x.y, y.y), silu(x.z, y.z), silu(x.w, y.w)});
}

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
  // Of a row without a matrix: where dim d is stored.
  __device__ int place(const RopeArgs& args, const SequenceView& s, int d) const {
    return stored_index(d, kind == 2 ? s.transform.v_groups : s.transform.k_groups, args.head_dim);
  }
};

struct DimPair {
  int first, second;  // dims
  float a, b;         // their values
};

// The i-th pair of dims of a row of a head, rotated where RoPE turns it, queries scaled: pairs are
// i and i + rope_dims / 2, then neighbours.
__device__ __forceinline__ DimPair turn(const RopeArgs& args, const RopeHead& head,
                                        const SequenceView& s, const float* from, int32_t position,
                                        int i) {
  const int half = args.rope_dims / 2;
  const bool turned = i < half;
  DimPair pair;
  pair.first = turned ? i : 2 * i;
  pair.second = turned ? i + half : 2 * i + 1;
  pair.a = from[pair.first];
  pair.b = from[pair.second];
  if (turned && head.rotates(args)) {
    const bool is_long = s.long_rope != 0 && args.long_frequencies != nullptr;
    const float frequency = (is_long ? args.long_frequencies : args.frequencies)[i];
    float cosine, sine;
    cos_sin(multiply_rounded(static_cast<float>(position), frequency), cosine, sine);
    cosine *= args.rope_scale;
    sine *= args.rope_scale;
    const float x = pair.a;
    pair.a = x * cosine - pair.b * sine;
    pair.b = pair.b * cosine + x * sine;
  }
  pair.a *= head.scale(args);
  pair.b *= head.scale(args);
  return pair;
}

// One row a block. Grid: x head, y row. Shared: the head's vector [head_dim], transform_scratch.
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeArgs args) {
  const int32_t row = static_cast<int32_t>(blockIdx.y);
  const SequenceView* found = find_sequence(args.sequences, args.n_sequences, row);
  if (found == nullptr) return;
  const SequenceView& s = *found;
  const int dims = args.head_dim;
  const RopeHead head(args, static_cast<int>(blockIdx.x));
  const float* const from = head.from(args, row);
  float* const x = reinterpret_cast<float*>(shared_memory());
  for (int i = thread(); i < dims / 2; i += kThreads) {
    const DimPair pair = turn(args, head, s, from, s.pos0 + row - s.row0, i);
    x[pair.first] = pair.a;
    x[pair.second] = pair.b;
  }
  sync_block();
  void* const to = head.to(args, s, row);
  const DType dtype = head.to_dtype(args);
  const float* const matrix = head.matrix(args, s);
  if (matrix == nullptr) {
    for (int d = thread(); d < dims; d += kThreads) {
      store_element(to, dtype, head.place(args, s, d), x[d]);
    }
  } else if (head.kind == 0) {
    transform_row_transposed<kThreads>(
        x, matrix, dims, [&](int d, float value) { store_element(to, dtype, d, value); });
  } else {
    transform_rows<kThreads, 1>(x, 1, matrix, dims, x + dims, [&](int, int d, float value) {
      store_element(to, dtype, d, value);
    });
  }
}

// Many rows, of whichever sequences; f16 or bf16 tail. Grid: x head, y rows. Shared: a RowBlock.
template <int kDims>
__global__ void __launch_bounds__(kBlockThreads) rope_append_block_kernel(RopeArgs args) {
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kBlockRows;
  const int n = args.n_rows - first < kBlockRows ? args.n_rows - first : kBlockRows;
  const RopeHead head(args, static_cast<int>(blockIdx.x));
  auto& rows = *reinterpret_cast<RowBlock<kDims>*>(shared_memory());
  rows.find(args.sequences, args.n_sequences, first, n,
            [&](const SequenceView& s) { return head.matrix(args, s); });
  const DType dtype = head.to_dtype(args);
  for (int i = thread(); i < n * kDims / 2; i += kBlockThreads) {
    const int r = i / (kDims / 2), row = first + r;
    const SequenceView* const s = rows.row(r).sequence;
    if (s == nullptr) continue;
    const DimPair pair =
        turn(args, head, *s, head.from(args, row), s->pos0 + row - s->row0, i % (kDims / 2));
    rows.put(r, pair.first, pair.a);
    rows.put(r, pair.second, pair.b);
  }
  sync_block();
  for (int i = thread(); i < n * kDims; i += kBlockThreads) {
    const int r = i / kDims, d = i % kDims;
    const auto& row = rows.row(r);
    if (row.sequence == nullptr || row.matrix != nullptr) continue;
    store_element(head.to(args, *row.sequence, first + r), dtype,
                  head.place(args, *row.sequence, d), rows.value(r, d));
  }
  const auto store = [&](int r, int d, float a, float b) {
    void* const to = head.to(args, *rows.row(r).sequence, first + r);
    store_element(to, dtype, d, a);
    store_element(to, dtype, d + 1, b);
  };
  if (head.kind == 0) {
    rows.template multiply<true>(n, store);
  } else {
    rows.template multiply<false>(n, store);
  }
}

// Rows of attention output times v_backward, in place. Grid: x head, y rows. Shared: a RowBlock.
template <int kDims>
__global__ void __launch_bounds__(kBlockThreads) undo_values_kernel(AttentionArgs args) {
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kBlockRows;
  const int n = args.n_rows - first < kBlockRows ? args.n_rows - first : kBlockRows;
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (args.n_heads / args.n_kv_heads);
  auto& rows = *reinterpret_cast<RowBlock<kDims>*>(shared_memory());
  rows.find(args.sequences, args.n_sequences, first, n, [&](const SequenceView& s) {
    const float* const backward = s.transform.v_backward;
    return backward == nullptr
               ? nullptr
               : backward + head_index(args.layer, args.n_kv_heads, kv_head) * kDims * kDims;
  });
  const auto at = [&](int r) {
    return args.out + (int64_t{first + r} * args.n_heads + head) * kDims;
  };
  for (int i = thread(); i < n * kDims; i += kBlockThreads) {
    const int r = i / kDims, d = i % kDims;
    if (rows.row(r).matrix != nullptr) rows.put(r, d, at(r)[d]);
  }
  sync_block();
  rows.template multiply<false>(n, [&](int r, int d, float a, float b) {
    *reinterpret_cast<float2*>(at(r) + d) = float2{a, b};
  });
}

void start_rms_norm(const float* x, const int32_t* rows, const float* weight, float eps, int64_t n,
                    int64_t hidden, bool add, DType dtype, void* out, Stream stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool fours = hidden % 4 == 0 && aligned(x) && aligned(weight) && aligned(out);
  launch("rms_norm", fours ? rms_norm_kernel<4> : rms_norm_kernel<1>, {n}, kThreads, kWarps * 4,
         stream, x, rows, weight, eps, hidden, add, dtype, out);
}

// body(constant of head_dim) where there is a kernel of many rows a block.
template <typename Body>
bool with_dims(int32_t head_dim, Body&& body) {
  switch (head_dim) {
    case 64:
      body(std::integral_constant<int, 64>());
      return true;
    case 96:
      body(std::integral_constant<int, 96>());
      return true;
    case 128:
      body(std::integral_constant<int, 128>());
      return true;
    default:
      return false;
  }
}

Grid block_grid(int32_t heads, int32_t n_rows) {
  return {heads, (n_rows + kBlockRows - 1) / kBlockRows};
}

}  // namespace

bool has_code_for_device() {
#if defined(MUSTAFAR_SIMT)
  return true;
#else
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, embed_kernel);
  if (status == cudaErrorInvalidDeviceFunction || status == cudaErrorNoKernelImageForDevice ||
      status == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    return false;
  }
  check(status, "cudaFuncGetAttributes");
  return true;
#endif
}

void embed(const void* table, DType dtype, const int32_t* token_ids, int32_t n, int64_t hidden,
           float* out, Stream stream) {
  launch("embed", embed_kernel, {n, (hidden + kThreads - 1) / kThreads}, kThreads, 0, stream, table,
         dtype, token_ids, hidden, out);
}

void rms_norm(const float* x, const int32_t* rows, const float* weight, float eps, int64_t n,
              int64_t hidden, float* out, Stream stream, bool add) {
  start_rms_norm(x, rows, weight, eps, n, hidden, add, DType::kF32, out, stream);
}

void rms_norm_rounded(const float* x, const float* weight, float eps, int64_t n, int64_t hidden,
                      DType dtype, void* out, Stream stream) {
  start_rms_norm(x, nullptr, weight, eps, n, hidden, false, dtype, out, stream);
}

void scale(float* x, float factor, int64_t count, Stream stream) {
  launch("scale", scale_kernel, {(count + kThreads - 1) / kThreads}, kThreads, 0, stream, x, factor,
         count);
}

void silu_multiply(const float* gate, const float* up, int64_t count, DType dtype, void* out,
                   Stream stream) {
  launch("silu_multiply", silu_multiply_kernel, {(count + 4 * kThreads - 1) / (4 * kThreads)},
         kThreads, 0, stream, gate, up, count, dtype, out);
}

void rope_append(const RopeArgs& args, Stream stream) {
  const int32_t heads = args.n_heads + 2 * args.n_kv_heads;
  const bool done =
      args.tail_dtype != DType::kF32 && args.n_rows > kFewRows &&
      with_dims(args.head_dim, [&](auto dims) {
        launch("rope_append_block", rope_append_block_kernel<dims>, block_grid(heads, args.n_rows),
               kBlockThreads, sizeof(RowBlock<dims>), stream, args);
      });
  if (done) return;
  const int floats = args.head_dim + transform_scratch(kThreads, 1, args.head_dim);
  launch("rope_append", rope_append_kernel, {heads, args.n_rows}, kThreads, floats * 4, stream,
         args);
}

bool undoes_values(int32_t head_dim) {
  return with_dims(head_dim, [](auto) {});
}

void undo_value_transform(const AttentionArgs& args, Stream stream) {
  const bool done = with_dims(args.head_dim, [&](auto dims) {
    launch("undo_values", undo_values_kernel<dims>, block_grid(args.n_heads, args.n_rows),
           kBlockThreads, sizeof(RowBlock<dims>), stream, args);
  });
  if (!done) throw Error("no kernel undoes a value transform of this head_dim");
}

}  // namespace mustafar::cuda
