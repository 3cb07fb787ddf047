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

// Shared: a partial sum per warp.
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const float* x, const int32_t* rows, const float* weight, float eps,
                    int64_t hidden, bool add, float* out) {
  const int64_t row = rows != nullptr ? rows[blockIdx.x] : static_cast<int64_t>(blockIdx.x);
  const float* from = x + row * hidden;
  float squares = 0.0f;
  for (int64_t i = thread(); i < hidden; i += kThreads) squares += from[i] * from[i];
  float* partial = reinterpret_cast<float*>(shared_memory());
  squares = warp_sum(squares);
  if (lane_id() == 0) partial[thread() / kWarpSize] = squares;
  sync_block();
  float total = 0.0f;
  for (int w = 0; w < kWarps; w++) total += partial[w];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(hidden) + eps);
  for (int64_t i = thread(); i < hidden; i += kThreads) {
    float* const to = out + int64_t{blockIdx.x} * hidden + i;
    const float value = from[i] * scale * weight[i];
    *to = add ? *to + value : value;
  }
}

__global__ void __launch_bounds__(kThreads) scale_kernel(float* x, float factor, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + thread();
  if (i < count) x[i] *= factor;
}

__global__ void __launch_bounds__(kThreads)
    silu_multiply_kernel(float* gate, const float* up, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + thread();
  if (i < count) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
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
  // Stores dim d of a row: in place, or rounded where the sequence's new tokens lie.
  __device__ void store(const RopeArgs& args, const SequenceView& s, int64_t row, int d,
                        float value) const {
    const int dims = args.head_dim;
    const int groups = matrix(args, s) != nullptr ? 1
                       : kind == 2                ? s.transform.v_groups
                                                  : s.transform.k_groups;
    const int at = stored_index(d, groups, dims);
    if (kind == 0) {
      args.q[(row * args.n_heads + head) * dims + at] = value;
      return;
    }
    const int64_t row_bytes = dims * (args.tail_dtype == DType::kF32 ? 4 : 2);
    // kind - 1 is kKeys or kValues; written as a choice between them, the stores are compiled
    // twice.
    uint8_t* const to =
        new_row(s, args.layer, kind - 1, args.n_kv_heads, head, s.pos0 + row - s.row0, row_bytes);
    store_element(to, args.tail_dtype, at, value);
  }
};

// The i-th pair of dims of a row of a head, rotated where RoPE turns it, queries scaled: pairs are
// i and i + rope_dims / 2, then neighbours.
__device__ __forceinline__ void turn(const RopeArgs& args, const RopeHead& head,
                                     const SequenceView& s, const float* from, int32_t position,
                                     int i, float* to) {
  const int half = args.rope_dims / 2;
  const bool turned = i < half;
  const int first = turned ? i : 2 * i, second = turned ? i + half : 2 * i + 1;
  float a = from[first], b = from[second];
  if (turned && head.rotates(args)) {
    const bool is_long = s.long_rope != 0 && args.long_frequencies != nullptr;
    const float frequency = (is_long ? args.long_frequencies : args.frequencies)[i];
    float cosine, sine;
    cos_sin(multiply_rounded(static_cast<float>(position), frequency), cosine, sine);
    cosine *= args.rope_scale;
    sine *= args.rope_scale;
    const float x = a;
    a = x * cosine - b * sine;
    b = b * cosine + x * sine;
  }
  to[first] = a * head.scale(args);
  to[second] = b * head.scale(args);
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
    turn(args, head, s, from, s.pos0 + row - s.row0, i, x);
  }
  sync_block();
  const float* const matrix = head.matrix(args, s);
  if (matrix == nullptr) {
    for (int d = thread(); d < dims; d += kThreads) head.store(args, s, row, d, x[d]);
  } else if (head.kind == 0) {
    transform_row_transposed<kThreads>(
        x, matrix, dims, [&](int d, float value) { head.store(args, s, row, d, value); });
  } else {
    transform_rows<kThreads, 1>(x, 1, matrix, dims, x + dims, [&](int, int d, float value) {
      head.store(args, s, row, d, value);
    });
  }
}

// 32 rows of one sequence a block, of a prompt. Grid: x head, y rows, z sequence. Shared:
// transform_block_floats.
template <int kTiles>
__global__ void __launch_bounds__(kBlockThreads) rope_append_block_kernel(RopeArgs args) {
  constexpr int kDims = 32 * kTiles;
  const SequenceView& s = args.sequences[blockIdx.z];
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kBlockRows;
  if (first >= s.n_rows) return;
  const int32_t n = s.n_rows - first < kBlockRows ? s.n_rows - first : kBlockRows;
  const RopeHead head(args, static_cast<int>(blockIdx.x));
  float* const x = reinterpret_cast<float*>(shared_memory());
  for (int i = thread(); i < n * kDims / 2; i += kBlockThreads) {
    const int r = i / (kDims / 2), d = i % (kDims / 2);
    turn(args, head, s, head.from(args, s.row0 + first + r), s.pos0 + first + r, d, x + r * kDims);
  }
  const auto store = [&](int r, int d, float value) {
    if (r < n) head.store(args, s, s.row0 + first + r, d, value);
  };
  const float* const matrix = head.matrix(args, s);
  if (matrix == nullptr) {
    sync_block();
    for (int i = thread(); i < n * kDims; i += kBlockThreads) store(i / kDims, i % kDims, x[i]);
    return;
  }
  for (int i = n * kDims + thread(); i < kBlockRows * kDims; i += kBlockThreads) x[i] = 0.0f;
  if (head.kind == 0) {
    transform_block<kTiles, true>(x, matrix, store);
  } else {
    transform_block<kTiles, false>(x, matrix, store);
  }
}

// The same rows of attention output times v_backward, in place. Grid: x head, y rows, z sequence.
template <int kTiles>
__global__ void __launch_bounds__(kBlockThreads) undo_values_kernel(AttentionArgs args) {
  constexpr int kDims = 32 * kTiles;
  const SequenceView& s = args.sequences[blockIdx.z];
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kBlockRows;
  if (first >= s.n_rows || s.transform.v_backward == nullptr) return;
  const int32_t n = s.n_rows - first < kBlockRows ? s.n_rows - first : kBlockRows;
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (args.n_heads / args.n_kv_heads);
  float* const x = reinterpret_cast<float*>(shared_memory());
  const auto at = [&](int r) {
    return args.out + (int64_t{s.row0 + first + r} * args.n_heads + head) * kDims;
  };
  for (int i = thread(); i < kBlockRows * kDims; i += kBlockThreads) {
    x[i] = i < n * kDims ? at(i / kDims)[i % kDims] : 0.0f;
  }
  transform_block<kTiles, false>(
      x, s.transform.v_backward + head_index(args.layer, args.n_kv_heads, kv_head) * kDims * kDims,
      [&](int r, int d, float value) {
        if (r < n) at(r)[d] = value;
      });
}

// body(constant of head_dim / 32) where there is a kernel of that width.
template <typename Body>
bool with_tiles(int32_t head_dim, Body&& body) {
  switch (head_dim) {
    case 64:
      body(std::integral_constant<int, 2>());
      return true;
    case 96:
      body(std::integral_constant<int, 3>());
      return true;
    case 128:
      body(std::integral_constant<int, 4>());
      return true;
    default:
      return false;
  }
}

Grid block_grid(int32_t heads, int32_t max_row_count, int32_t n_sequences) {
  return {heads, (max_row_count + kBlockRows - 1) / kBlockRows, n_sequences};
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
  launch("rms_norm", rms_norm_kernel, {n}, kThreads, kWarps * 4, stream, x, rows, weight, eps,
         hidden, add, out);
}

void scale(float* x, float factor, int64_t count, Stream stream) {
  launch("scale", scale_kernel, {(count + kThreads - 1) / kThreads}, kThreads, 0, stream, x, factor,
         count);
}

void silu_multiply(float* gate, const float* up, int64_t count, Stream stream) {
  launch("silu_multiply", silu_multiply_kernel, {(count + kThreads - 1) / kThreads}, kThreads, 0,
         stream, gate, up, count);
}

void rope_append(const RopeArgs& args, Stream stream) {
  const int32_t heads = args.n_heads + 2 * args.n_kv_heads;
  const bool done = args.max_row_count > 1 && with_tiles(args.head_dim, [&](auto tiles) {
                      launch("rope_append_block", rope_append_block_kernel<decltype(tiles)::value>,
                             block_grid(heads, args.max_row_count, args.n_sequences), kBlockThreads,
                             transform_block_floats(args.head_dim) * 4, stream, args);
                    });
  if (done) return;
  const int floats = args.head_dim + transform_scratch(kThreads, 1, args.head_dim);
  launch("rope_append", rope_append_kernel, {heads, args.n_rows}, kThreads, floats * 4, stream,
         args);
}

bool undo_value_transform(const AttentionArgs& args, Stream stream) {
  return with_tiles(args.head_dim, [&](auto tiles) {
    launch("undo_values", undo_values_kernel<decltype(tiles)::value>,
           block_grid(args.n_heads, args.max_row_count, args.n_sequences), kBlockThreads,
           transform_block_floats(args.head_dim) * 4, stream, args);
  });
}

}  // namespace mustafar::cuda
