// The small operations between the matrix products: embedding rows, RMSNorm, SiLU, rotary embedding
// with append. One row, or one head of a row, a block; all memory-bound.
#include "cuda/architectures.h"
#include "cuda/device_ops.cuh"
#include "cuda/elementwise.h"
#include "cuda/launch.cuh"

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
                    int64_t hidden, float* out) {
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
    out[int64_t{blockIdx.x} * hidden + i] = from[i] * scale * weight[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    silu_multiply_kernel(float* gate, const float* up, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + thread();
  if (i < count) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

constexpr int kRopeThreads = 64;

// To about 2e-7 for angles up to 1e6. The angle is reduced in half turns, its product with 1 / pi
// in two floats: cosf and sinf would bring a table in local memory for angles beyond 1e5.
__device__ void cos_sin(float angle, float& cosine, float& sine) {
  constexpr float kInversePi = 0.318309873f, kInversePiRest = 1.28412766e-8f;
  const float turns = multiply_rounded(angle, kInversePi);
  const float rest = fmaf(angle, kInversePiRest, fmaf(angle, kInversePi, -turns));
  cos_sin_pi(turns - 2.0f * rintf(0.5f * turns) + rest, cosine, sine);
}

// Grid: x head (queries, then keys, then values), y row. Shared: the head's vector [head_dim].
__global__ void __launch_bounds__(kRopeThreads) rope_append_kernel(RopeArgs args) {
  wait_for_previous();
  const int32_t row = static_cast<int32_t>(blockIdx.y);
  const SequenceView* found = find_sequence(args.sequences, args.n_sequences, row);
  if (found == nullptr) return;
  const SequenceView& s = *found;
  const int dims = args.head_dim, half = dims / 2;
  const int index = static_cast<int>(blockIdx.x);
  const int kind = index < args.n_heads ? 0 : index < args.n_heads + args.n_kv_heads ? 1 : 2;
  const int head = kind == 0 ? index : (index - args.n_heads) % args.n_kv_heads;
  const int kv_head = kind == 0 ? head / (args.n_heads / args.n_kv_heads) : head;
  const float* from =
      kind == 0 ? args.q + (int64_t{row} * args.n_heads + head) * dims
                : (kind == 1 ? args.k : args.v) + (int64_t{row} * args.n_kv_heads + head) * dims;
  float* x = reinterpret_cast<float*>(shared_memory());
  const int32_t position = s.pos0 + row - s.row0;
  if (kind == 2) {
    for (int d = thread(); d < dims; d += kRopeThreads) x[d] = from[d];
  } else {
    for (int i = thread(); i < half; i += kRopeThreads) {
      const float angle = multiply_rounded(static_cast<float>(position), args.frequencies[i]);
      float cosine, sine;
      cos_sin(angle, cosine, sine);
      const float a = from[i], b = from[i + half];
      x[i] = a * cosine - b * sine;
      x[i + half] = b * cosine + a * sine;
    }
  }
  sync_block();

  const float* matrix = kind == 0 ? s.k_backward : kind == 1 ? s.k_forward : s.v_forward;
  if (matrix != nullptr) {
    matrix += (int64_t{args.layer} * args.n_kv_heads + kv_head) * dims * dims;
  }
  const auto value = [&](int d) {
    if (matrix == nullptr) return x[d];
    float sum = 0.0f;  // k F and v F, but q B^T
    for (int j = 0; j < dims; j++) {
      sum += x[j] * (kind == 0 ? matrix[d * dims + j] : matrix[j * dims + d]);
    }
    return sum;
  };
  const int32_t groups = matrix != nullptr ? 1 : kind == 2 ? s.v_groups : s.k_groups;
  if (kind == 0) {
    float* to = args.q + (int64_t{row} * args.n_heads + head) * dims;
    for (int d = thread(); d < dims; d += kRopeThreads) {
      to[stored_index(d, groups, dims)] = value(d);
    }
    return;
  }
  const int64_t row_bytes = dims * (args.tail_dtype == DType::kF32 ? 4 : 2);
  uint8_t* to;
  if (s.fresh != nullptr) {
    to = s.fresh + (int64_t{kind - 1} * args.n_kv_heads + head) * s.fresh_capacity * row_bytes +
         (position - s.fresh_pos0) * row_bytes;
  } else {
    to = s.dense + dense_offset(s, args.layer, kind - 1, args.n_kv_heads, head, row_bytes) +
         s.dense_tokens * row_bytes;
  }
  for (int d = thread(); d < dims; d += kRopeThreads) {
    store_element(to, args.tail_dtype, stored_index(d, groups, dims), value(d));
  }
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

int code_architecture() {
#if defined(MUSTAFAR_SIMT)
  return 0;
#else
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, embed_kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
#endif
}

void embed(const void* table, DType dtype, const int32_t* token_ids, int32_t n, int64_t hidden,
           float* out, Stream stream) {
  launch("embed", embed_kernel, {n, (hidden + kThreads - 1) / kThreads}, kThreads, 0, stream, table, dtype, token_ids, hidden, out);
}

void rms_norm(const float* x, const int32_t* rows, const float* weight, float eps, int32_t n,
              int64_t hidden, float* out, Stream stream) {
  launch("rms_norm", rms_norm_kernel, {n}, kThreads, kWarps * 4, stream, x, rows, weight, eps,
         hidden, out);
}

void silu_multiply(float* gate, const float* up, int64_t count, Stream stream) {
  launch("silu_multiply", silu_multiply_kernel, {(count + kThreads - 1) / kThreads}, kThreads, 0,
         stream, gate, up, count);
}

void rope_append(const RopeArgs& args, Stream stream) {
  launch_overlapping("rope_append", rope_append_kernel, {args.n_heads + 2 * args.n_kv_heads, args.n_rows},
         kRopeThreads, args.head_dim * 4, stream, args);
}

}  // namespace mustafar::cuda
