// The device language of our kernels: thin wrappers that hold PTX and intrinsics under nvcc, and
// the same operations on the host SIMT harness (tests/simt) where MUSTAFAR_SIMT is defined. Kernels
// use nothing of the device beyond this file, async_copy.cuh and matrix_ops.cuh, so that each of
// them runs, and is tested, without a GPU.
//
// Rules that the harness relies on: all shared memory is dynamic (shared_memory()); warp
// collectives are always full; blocks are multiples of 32 threads and do not wait for each other.
#pragma once

#include <cstdint>

#include "core/dtype.h"

#if defined(MUSTAFAR_SIMT)
#include <cmath>
#include <cstring>

#include "simt.h"
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace mustafar::cuda {

constexpr int kWarpSize = 32;
constexpr float kLog2E = 1.44269504f;  // softmax scores are in units of log2

// ---- barriers and collectives of a full warp ----

__device__ __forceinline__ int lane_id() {
#if defined(MUSTAFAR_SIMT)
  return simt::lane();
#else
  return static_cast<int>(threadIdx.x & 31u);
#endif
}

// x, which the compiler then keeps in a register instead of working it out again at every use.
__device__ __forceinline__ int kept(int x) {
#if !defined(MUSTAFAR_SIMT)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

__device__ __forceinline__ uint8_t* shared_memory() {  // the launch's, 16-byte aligned
#if defined(MUSTAFAR_SIMT)
  return simt::dynamic_shared();
#else
  extern __shared__ uint4 memory[];
  return reinterpret_cast<uint8_t*>(memory);
#endif
}

__device__ __forceinline__ void sync_block() {
#if defined(MUSTAFAR_SIMT)
  simt::sync_block();
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void sync_warp() {
#if defined(MUSTAFAR_SIMT)
  simt::exchange("sync_warp", "", 0);
#else
  __syncwarp();
#endif
}

template <typename T>
__device__ __forceinline__ T shuffle(T value, int source_lane) {
#if defined(MUSTAFAR_SIMT)
  return simt::exchange_all("shuffle", value)[source_lane & 31];
#else
  return __shfl_sync(0xffffffffu, value, source_lane);
#endif
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
#if defined(MUSTAFAR_SIMT)
  return simt::exchange_all("shuffle_xor", value)[simt::lane() ^ lane_mask];
#else
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
#endif
}

__device__ __forceinline__ uint32_t ballot(bool predicate) {
#if defined(MUSTAFAR_SIMT)
  const auto lanes = simt::exchange_all("ballot", predicate);
  uint32_t bits = 0;
  for (int i = 0; i < 32; i++) bits |= uint32_t{lanes[i]} << i;
  return bits;
#else
  return __ballot_sync(0xffffffffu, predicate);
#endif
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) value += shuffle_xor(value, m);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) value = fmaxf(value, shuffle_xor(value, m));
  return value;
}

// ---- bits ----

__device__ __forceinline__ int popcount(uint32_t x) {
#if defined(MUSTAFAR_SIMT)
  return __builtin_popcount(x);
#else
  return __popc(x);
#endif
}

// PRMT: byte i of the result is byte (selector >> 4i & 7) of {low, high}, or, with bit 3 of that
// digit, its sign. Bits above the fourth digit do not count: PTX, since __byte_perm would spend an
// instruction on masking them off.
__device__ __forceinline__ uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(MUSTAFAR_SIMT)
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#endif
}

// a & b | c, in one instruction even where b and c are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#if defined(MUSTAFAR_SIMT)
  return (a & b) | c;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#endif
}

// Low word of {high, low} >> min(shift, 32).
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
#if defined(MUSTAFAR_SIMT)
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift < 32 ? shift : 32));
#else
  return __funnelshift_rc(low, high, shift);
#endif
}

__device__ __forceinline__ uint32_t float_bits(float x) {
#if defined(MUSTAFAR_SIMT)
  return bits_of(x);
#else
  return __float_as_uint(x);
#endif
}

__device__ __forceinline__ float bits_float(uint32_t x) {
#if defined(MUSTAFAR_SIMT)
  return float_of(x);
#else
  return __uint_as_float(x);
#endif
}

// Sixteen bytes that are read once, so not left in the L1, and that nobody writes meanwhile.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
#if defined(MUSTAFAR_SIMT)
  return *static_cast<const uint4*>(from);
#else
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
#endif
}

// The same into words where `wanted`, which else stay as they are: no copy waits for the load.
__device__ __forceinline__ void load_streaming_if(bool wanted, const void* from, uint4& words) {
#if defined(MUSTAFAR_SIMT)
  if (wanted) words = *static_cast<const uint4*>(from);
#else
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
#endif
}

// The same of what other lanes and warps read, too.
__device__ __forceinline__ void load_if(bool wanted, const void* from, uint4& words) {
#if defined(MUSTAFAR_SIMT)
  if (wanted) words = *static_cast<const uint4*>(from);
#else
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
      "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
#endif
}
__device__ __forceinline__ void load_if(bool wanted, const void* from, uint2& words) {
#if defined(MUSTAFAR_SIMT)
  if (wanted) words = *static_cast<const uint2*>(from);
#else
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %3, 0;\n"
      "@p ld.global.nc.v2.u32 {%0, %1}, [%2]; }"
      : "+r"(words.x), "+r"(words.y)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
#endif
}
__device__ __forceinline__ void load_if(bool wanted, const void* from, uint32_t& word) {
#if defined(MUSTAFAR_SIMT)
  if (wanted) word = *static_cast<const uint32_t*>(from);
#else
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0;\n"
      "@p ld.global.nc.u32 %0, [%1]; }"
      : "+r"(word)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
#endif
}

// ---- arithmetic ----

// The upper half of a product.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(MUSTAFAR_SIMT)
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#else
  return __umulhi(a, b);
#endif
}

// Product and sum rounded one by one, never contracted to an FMA: what the CPU packer computes.
__device__ __forceinline__ float multiply_rounded(float a, float b) {
#if defined(MUSTAFAR_SIMT)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

__device__ __forceinline__ float add_rounded(float a, float b) {
#if defined(MUSTAFAR_SIMT)
  return a + b;
#else
  return __fadd_rn(a, b);
#endif
}

__device__ __forceinline__ float divide_rounded(float a, float b) {
#if defined(MUSTAFAR_SIMT)
  return a / b;
#else
  return __fdiv_rn(a, b);
#endif
}

__device__ __forceinline__ float sqrt_rounded(float x) {
#if defined(MUSTAFAR_SIMT)
  return std::sqrt(x);
#else
  return __fsqrt_rn(x);
#endif
}

// 2^x, to about 2 units in the last place; 0 for -Inf.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(MUSTAFAR_SIMT)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Cosine and sine of pi x.
__device__ __forceinline__ void cos_sin_pi(float x, float& cosine, float& sine) {
#if defined(MUSTAFAR_SIMT)
  cosine = static_cast<float>(std::cos(3.14159265358979323846 * x));
  sine = static_cast<float>(std::sin(3.14159265358979323846 * x));
#else
  sincospif(x, &sine, &cosine);
#endif
}

// Of a normal x.
__device__ __forceinline__ float log2_approx(float x) {
#if defined(MUSTAFAR_SIMT)
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float bf16_float(uint16_t bits) {
  return bits_float(uint32_t{bits} << 16);
}

__device__ __forceinline__ float f16_float(uint16_t bits) {
#if defined(MUSTAFAR_SIMT)
  return f16_to_f32(bits);
#else
  return __half2float(__ushort_as_half(bits));
#endif
}

__device__ __forceinline__ uint16_t float_bf16(float x) {  // to nearest even; NaN as the CPU's
#if defined(MUSTAFAR_SIMT)
  return f32_to_bf16(x);
#else
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
}

__device__ __forceinline__ uint16_t float_f16(float x) {
#if defined(MUSTAFAR_SIMT)
  return f32_to_f16(x);
#else
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    return static_cast<uint16_t>((u >> 16 & 0x8000u) | 0x7e00u | (u >> 13 & 0x1ffu));
  }
  return __half_as_ushort(__float2half_rn(x));
#endif
}

// Two 2-byte values in one word, the first in the low half. kType: kF16 or kBF16.
template <DType kType>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
#if defined(MUSTAFAR_SIMT)
  return kType == DType::kF16 ? uint32_t{f32_to_f16(high)} << 16 | f32_to_f16(low)
                              : uint32_t{f32_to_bf16(high)} << 16 | f32_to_bf16(low);
#else
  uint32_t word;
  if constexpr (kType == DType::kF16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#endif
}

// Two f16 in one word; what is beyond their range becomes the largest.
__device__ __forceinline__ uint32_t pack2_f16_saturated(float low, float high) {
#if defined(MUSTAFAR_SIMT)
  const auto saturated = [](float x) {
    return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
  };
  return pack2<DType::kF16>(saturated(low), saturated(high));
#else
  uint32_t word;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

template <DType kType>
__device__ __forceinline__ float half_float(uint16_t bits) {
  return kType == DType::kF16 ? f16_float(bits) : bf16_float(bits);
}

// Element i of an array of f32, f16 or bf16.
__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype != DType::kF16) return bf16_float(bits);
  // The device's conversion would lose a NaN's sign and payload, which the CPU packs as they are.
  const uint32_t wide = bits;
  if ((wide & 0x7fffu) > 0x7c00u) {
    return bits_float((wide & 0x8000u) << 16 | 0x7f800000u | (wide & 0x3ffu) << 13);
  }
  return f16_float(bits);
}

__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::kF32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == DType::kF16 ? float_f16(x) : float_bf16(x);
  }
}

// Two neighbours, the first at a multiple of two.
__device__ __forceinline__ void store_two(void* data, DType dtype, int64_t i, float a, float b) {
  if (dtype == DType::kF32) {
    *reinterpret_cast<float2*>(static_cast<float*>(data) + i) = float2{a, b};
    return;
  }
  *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(data) + i) =
      dtype == DType::kF16 ? uint32_t{float_f16(b)} << 16 | float_f16(a)
                           : uint32_t{float_bf16(b)} << 16 | float_bf16(a);
}

// Four neighbours, the first at a multiple of four.
__device__ __forceinline__ void store_four(void* data, DType dtype, int64_t i, const float4& x) {
  if (dtype == DType::kF32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + i) = x;
    return;
  }
  const auto two = [&](float low, float high) {
    return dtype == DType::kF16 ? uint32_t{float_f16(high)} << 16 | float_f16(low)
                                : uint32_t{float_bf16(high)} << 16 | float_bf16(low);
  };
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + i) = {two(x.x, x.y), two(x.z, x.w)};
}

// Two f16 in a word: a - b in each half.
__device__ __forceinline__ uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
#if defined(MUSTAFAR_SIMT)
  const auto half = [](uint32_t word, int i) {
    return f16_to_f32(static_cast<uint16_t>(word >> (16 * i)));
  };
  return pack2<DType::kF16>(half(a, 0) - half(b, 0), half(a, 1) - half(b, 1));
#else
  uint32_t word;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#endif
}

// Two f16 in a word: a * b + c in each half, rounded once.
__device__ __forceinline__ uint32_t multiply_add_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(MUSTAFAR_SIMT)
  const auto half = [](uint32_t word, int i) {
    return f16_to_f32(static_cast<uint16_t>(word >> (16 * i)));
  };
  return pack2<DType::kF16>(std::fma(half(a, 0), half(b, 0), half(c, 0)),
                            std::fma(half(a, 1), half(b, 1), half(c, 1)));
#else
  uint32_t word;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  return word;
#endif
}

// Two bf16 in a word: a * b + c in each half, rounded once.
__device__ __forceinline__ uint32_t multiply_add_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(MUSTAFAR_SIMT)
  const auto half = [](uint32_t word, int i) {
    return bf16_float(static_cast<uint16_t>(word >> (16 * i)));
  };
  return pack2<DType::kBF16>(std::fma(half(a, 0), half(b, 0), half(c, 0)),
                             std::fma(half(a, 1), half(b, 1), half(c, 1)));
#else
  uint32_t word;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  return word;
#endif
}

// Lowers *at to value where that is smaller.
__device__ __forceinline__ void atomic_minimum(int32_t* at, int32_t value) {
#if defined(MUSTAFAR_SIMT)
  if (value < *at) *at = value;
#else
  atomicMin(at, value);
#endif
}

// *at, which nothing writes while the kernel runs.
template <typename T>
__device__ __forceinline__ T* load_constant_pointer(T* const* at) {
#if defined(MUSTAFAR_SIMT)
  return *at;
#else
  static_assert(sizeof(T*) == sizeof(unsigned long long));
  return reinterpret_cast<T*>(__ldg(reinterpret_cast<const unsigned long long*>(at)));
#endif
}

}  // namespace mustafar::cuda
