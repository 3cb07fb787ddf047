// The device language of our kernels: thin wrappers that hold PTX and intrinsics under nvcc, and
// the same operations on the host SIMT harness (tests/simt) where MUSTAFAR_SIMT is defined. Kernels
// use nothing of the device beyond this file, so that each of them runs, and is tested, without a
// GPU.
//
// Rules that the harness relies on: shared memory is dynamic alone (shared_memory()); warp
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

// ---- barriers and collectives of a full warp ----

__device__ __forceinline__ int lane_id() {
#if defined(MUSTAFAR_SIMT)
  return simt::lane();
#else
  return static_cast<int>(threadIdx.x & 31u);
#endif
}

// x as a value of its own: kept in a register, not worked out again where it is used.
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
// digit, its sign. Bits above the fourth digit do not count; __byte_perm would mask them first.
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

// Sixteen bytes that are read once and written by nobody meanwhile: past the L1.
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

// ---- arithmetic ----

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

__device__ __forceinline__ float log2_approx(float x) {
#if defined(MUSTAFAR_SIMT)
  return std::log2(x);
#else
  return __log2f(x);
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

// f16 pairs: a - b in each half.
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

// f16 pairs: a * b + c in each half, rounded once.
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

// The smallest value seen at *at becomes value, if that is smaller.
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

// ---- asynchronous copies to shared memory ----

// 16 bytes, both addresses aligned to 16; past L1.
__device__ __forceinline__ void cp_async16(void* to_shared, const void* from) {
#if defined(MUSTAFAR_SIMT)
  simt::cp_async(to_shared, from, 16);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}

// 8 bytes, both addresses aligned to 8.
__device__ __forceinline__ void cp_async8(void* to_shared, const void* from) {
#if defined(MUSTAFAR_SIMT)
  simt::cp_async(to_shared, from, 8);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
#endif
}

// 16 bytes as cp_async16 does, or 16 zero bytes where there is nothing to copy; from is then not
// read.
__device__ __forceinline__ void cp_async16_or_zero(void* to_shared, const void* from, bool copy) {
#if defined(MUSTAFAR_SIMT)
  alignas(16) static const uint8_t kZeros[16] = {};
  simt::cp_async(to_shared, copy ? from : kZeros, 16);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  const uint32_t bytes = copy ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(MUSTAFAR_SIMT)
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups are still under way.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
#if defined(MUSTAFAR_SIMT)
  simt::cp_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- matrices in fragments ----
// With g = lane / 4 and c = lane % 4, of the 2-byte shapes: A [16][16] a0: (row g, columns 2c,
// 2c+1), a1: row g+8, a2: columns +8, a3: both; B [16][8] b0: (rows 2c, 2c+1, column g), b1: rows
// +8; C [16][8] c0, c1: (row g, columns 2c, 2c+1), c2, c3: row g+8. Of the 1-byte shape: A [16][32]
// a0: (row g, columns 4c .. 4c+3), a1: row g+8, a2: columns +16, a3: both; B [32][8] b0: (rows 4c
// .. 4c+3, column g), b1: rows +16; C as before.

#if defined(MUSTAFAR_SIMT)
struct MmaOperands {
  uint32_t a[4], b[2];
};
inline simt::Lanes<MmaOperands> exchange_operands(const char* name, const uint32_t* a,
                                                  const uint32_t* b) {
  MmaOperands mine;
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b, b, 8);
  return simt::exchange_all(name, mine);
}
#endif

// acc += A B in f32. kType: kF16 or kBF16.
template <DType kType>
__device__ __forceinline__ void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#if defined(MUSTAFAR_SIMT)
  const auto lanes = exchange_operands("mma_16x8x16", a, b);
  const int g = simt::lane() >> 2, c = simt::lane() & 3;
  MmaOperands rows[4], columns[8];  // lanes that hold A of row g and B of columns 2c, 2c + 1
  for (int i = 0; i < 4; i++) rows[i] = lanes[4 * g + i];
  for (int i = 0; i < 8; i++) columns[i] = lanes[4 * (2 * c + i / 4) + i % 4];
  for (int k = 0; k < 16; k++) {
    const auto at = [k](uint32_t word) { return static_cast<uint16_t>(word >> (16 * (k & 1))); };
    const int owner = (k & 7) / 2;
    for (int i = 0; i < 4; i++) {
      acc[i] += half_float<kType>(at(rows[owner].a[(i >> 1) + 2 * (k >> 3)])) *
                half_float<kType>(at(columns[4 * (i & 1) + owner].b[k >> 3]));
    }
  }
#else
  if constexpr (kType == DType::kF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// acc += A B of signed bytes.
__device__ __forceinline__ void mma_16x8x32_s8(int32_t (&acc)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
#if defined(MUSTAFAR_SIMT)
  const auto lanes = exchange_operands("mma_16x8x32_s8", a, b);
  const int g = simt::lane() >> 2, c = simt::lane() & 3;
  MmaOperands rows[4], columns[8];
  for (int i = 0; i < 4; i++) rows[i] = lanes[4 * g + i];
  for (int i = 0; i < 8; i++) columns[i] = lanes[4 * (2 * c + i / 4) + i % 4];
  for (int k = 0; k < 32; k++) {
    const auto at = [k](uint32_t word) { return static_cast<int8_t>(word >> (8 * (k & 3))); };
    const int owner = (k & 15) / 4;
    for (int i = 0; i < 4; i++) {
      acc[i] +=
          at(rows[owner].a[(i >> 1) + 2 * (k >> 4)]) * at(columns[4 * (i & 1) + owner].b[k >> 4]);
    }
  }
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Transposes an 8 x 8 matrix of 2-byte elements of which lane (g, c) holds row g, columns 2c, 2c+1.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t word) {
#if defined(MUSTAFAR_SIMT)
  const auto lanes = simt::exchange_all("transpose_8x8", word);
  const int g = simt::lane() >> 2, c = simt::lane() & 3;
  const auto at = [&](int row, int column) {
    return lanes[4 * row + column / 2] >> (16 * (column & 1)) & 0xffffu;
  };
  return at(2 * c, g) | at(2 * c + 1, g) << 16;
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
#endif
}

// Four 8 x 8 matrices of 2-byte elements from shared memory: lane i gives the address (16-byte
// aligned) of row i % 8 of matrix i / 8; out[m]: lane (g, c) gets row g, columns 2c, 2c+1 of matrix
// m, or with kTransposed rows 2c, 2c+1 of column g.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#if defined(MUSTAFAR_SIMT)
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("misaligned ldmatrix row");
  const auto rows = simt::exchange_all("load_matrices", static_cast<const uint16_t*>(row));
  const int g = simt::lane() >> 2, c = simt::lane() & 3;
  for (int m = 0; m < 4; m++) {
    const uint32_t low = kTransposed ? rows[8 * m + 2 * c][g] : rows[8 * m + g][2 * c];
    const uint32_t high = kTransposed ? rows[8 * m + 2 * c + 1][g] : rows[8 * m + g][2 * c + 1];
    out[m] = low | high << 16;
  }
  simt::exchange("load_matrices", "", 0);  // no lane may overwrite a row that another still reads
#else
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
  }
#endif
}

}  // namespace mustafar::cuda
