// The small operations between the matrix products: embedding rows, RMSNorm, SiLU.
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

void start_rms_norm(const float* x, const int32_t* rows, const float* weight, float eps, int64_t n,
                    int64_t hidden, bool add, DType dtype, void* out, Stream stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool fours = hidden % 4 == 0 && aligned(x) && aligned(weight) && aligned(out);
  launch("rms_norm", fours ? rms_norm_kernel<4> : rms_norm_kernel<1>, {n}, kThreads, kWarps * 4,
         stream, x, rows, weight, eps, hidden, add, dtype, out);
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

}  // namespace mustafar::cuda
