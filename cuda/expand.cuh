// Compressed rows into registers: a run of kept values and its mask bits become dense operands of a
// matrix product, zeros included, four dims (a nibble of the mask) at a time.
//
// A table in shared memory gives for every nibble a PRMT selector that puts the next kept bytes
// into their places (digit 4: a byte of the second operand) and, in its high half, the bits
// consumed. It is replicated per lane, so that a lookup never conflicts. 2-byte values are expanded
// as two planes of bytes and woven together again.
#pragma once

#include "cuda/device_ops.cuh"
#include "format/block_format.h"

namespace mustafar::cuda {

constexpr int kTableBytes = 16 * kWarpSize * 4;

// Fills the table, kTableBytes of shared memory, by a block of 128 threads at least, 16 bytes each;
// a barrier must follow.
__device__ __forceinline__ void fill_expand_table(uint8_t* table) {
  const uint32_t i = threadIdx.x;
  if (i >= kTableBytes / 16) return;
  const uint32_t nibble = i / (kWarpSize / 4);
  uint32_t selector = 0, taken = 0;
#pragma unroll
  for (int dim = 0; dim < 4; dim++) {
    selector |= (nibble >> dim & 1u ? taken++ : 4u) << (4 * dim);
  }
  const uint32_t entry = selector | (8 * taken) << 16;
  reinterpret_cast<uint4*>(table)[i] = {entry, entry, entry, entry};
}

// The entry of nibble kNibble of a mask; table: of this lane.
template <int kNibble>
__device__ __forceinline__ uint32_t table_entry(const uint8_t* lane_table, uint32_t mask) {
  // A lane's entries are 128 bytes apart: the offset is the nibble times 128.
  constexpr int kShift = 4 * kNibble - 7;
  uint32_t offset;
  if constexpr (kShift < 0) {
    offset = mask << -kShift & 0x780u;
  } else {
    offset = mask >> kShift & 0x780u;
  }
  return *reinterpret_cast<const uint32_t*>(lane_table + offset);
}

// Four 2-byte values from their planes, as two words.
__device__ __forceinline__ void weave(uint32_t low, uint32_t high, uint32_t* pair) {
  pair[0] = byte_permute(low, high, 0x5140);
  pair[1] = byte_permute(low, high, 0x7362);
}

// The low four nibbles of a word as bytes: sixteen times the signed 4-bit value.
__device__ __forceinline__ uint32_t spread_nibbles(uint32_t word) {
  uint32_t t = word & 0xffffu;
  t = (t | t << 8) & 0x00ff00ffu;
  t = (t | t << 4) & 0x0f0f0f0fu;
  return t << 4;
}

// Words that hold kDims expanded values: 2 bytes each, or 1 (int8 codes; int4 codes times 16).
template <int kBits, int kDims>
constexpr int kExpandedWords = kBits == 16 ? kDims / 2 : kDims / 4;

// A run whose length is known when compiling, held in registers: kRunWords words for kDims dims.
// run: the first word. bias: xor-ed into every byte of 1-byte values, zeros included.
template <int kBits, int kDims, int kRunWords>
struct RegisterRun {
  static constexpr int kPlanes = kBits == 16 ? 2 : 1;
  static constexpr int kPlaneWords =
      kBits == 4 ? 2 * kRunWords : (kRunWords + kPlanes - 1) / kPlanes;

  static __device__ __forceinline__ void expand(const uint32_t* run, uint32_t mask,
                                                const uint8_t* lane_table, uint32_t bias,
                                                uint32_t (&out)[kExpandedWords<kBits, kDims>]) {
    uint32_t planes[kPlanes][kPlaneWords];
    if constexpr (kBits == 16) {
#pragma unroll
      for (int i = 0; i < kPlaneWords; i++) {
        const uint32_t a = run[2 * i], b = 2 * i + 1 < kRunWords ? run[2 * i + 1] : 0u;
        planes[0][i] = byte_permute(a, b, 0x6420);
        planes[1][i] = byte_permute(a, b, 0x7531);
      }
    } else if constexpr (kBits == 4) {
      // Values 0, 2, 4, 6 of a word and 1, 3, 5, 7, each in the high half of its byte.
#pragma unroll
      for (int i = 0; i < kRunWords; i++) {
        const uint32_t even = (run[i] << 4 & 0xf0f0f0f0u) ^ bias;
        const uint32_t odd = (run[i] & 0xf0f0f0f0u) ^ bias;
        planes[0][2 * i] = byte_permute(even, odd, 0x5140);
        planes[0][2 * i + 1] = byte_permute(even, odd, 0x7362);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPlaneWords; i++) planes[0][i] = run[i] ^ bias;
    }
    step<0>(planes, mask, lane_table, bias, out);
  }

 private:
  template <int kNibble>
  static __device__ __forceinline__ void step(uint32_t (&planes)[kPlanes][kPlaneWords],
                                              uint32_t mask, const uint8_t* lane_table,
                                              uint32_t bias,
                                              uint32_t (&out)[kExpandedWords<kBits, kDims>]) {
    const uint32_t entry = table_entry<kNibble>(lane_table, mask);
    uint32_t bytes[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; p++) bytes[p] = byte_permute(planes[p][0], bias, entry);
    if constexpr (kBits == 16) {
      weave(bytes[0], bytes[1], &out[2 * kNibble]);
    } else {
      out[kNibble] = bytes[0];
    }
    if constexpr (kNibble + 1 < kDims / 4) {
      const uint32_t consumed = entry >> 16;
#pragma unroll
      for (int p = 0; p < kPlanes; p++) {
#pragma unroll
        for (int i = 0; i < kPlaneWords; i++) {
          // Words that no later nibble can reach need no shifting.
          if (i > kDims / 4 - 2 - kNibble) continue;
          const uint32_t next = i + 1 < kPlaneWords ? planes[p][i + 1] : 0u;
          planes[p][i] = funnel_right(planes[p][i], next, consumed);
        }
      }
      step<kNibble + 1>(planes, mask, lane_table, bias, out);
    }
  }
};

// A run of any length and alignment, read from memory as it is consumed. values: the row's first
// word; start: index of the run's first value in the row. Reads up to 8 bytes past the run's end.
template <int kBits, int kDims>
struct MemoryRun {
  static __device__ __forceinline__ void expand(const uint32_t* values, int start, uint32_t mask,
                                                const uint8_t* lane_table, uint32_t bias,
                                                uint32_t (&out)[kExpandedWords<kBits, kDims>]) {
    step<0>(values, start, mask, lane_table, bias, out);
  }

 private:
  template <int kNibble>
  static __device__ __forceinline__ void step(const uint32_t* values, int at, uint32_t mask,
                                              const uint8_t* lane_table, uint32_t bias,
                                              uint32_t (&out)[kExpandedWords<kBits, kDims>]) {
    const uint32_t entry = table_entry<kNibble>(lane_table, mask);
    constexpr int kPerWord = 32 / kBits;
    const uint32_t* word = values + at / kPerWord;
    const uint32_t shift = static_cast<uint32_t>(at % kPerWord * kBits);
    const uint32_t first = funnel_right(word[0], word[1], shift);
    if constexpr (kBits == 16) {
      const uint32_t second = funnel_right(word[1], word[2], shift);
      const uint32_t low = byte_permute(first, second, 0x6420);
      const uint32_t high = byte_permute(first, second, 0x7531);
      weave(byte_permute(low, 0u, entry), byte_permute(high, 0u, entry), &out[2 * kNibble]);
    } else {
      out[kNibble] = byte_permute(kBits == 4 ? spread_nibbles(first) : first, 0u, entry) ^ bias;
    }
    if constexpr (kNibble + 1 < kDims / 4) {
      step<kNibble + 1>(values, at + static_cast<int>(entry >> 19), mask, lane_table, bias, out);
    }
  }
};

// kDims values of a dense row from dim first_dim on.
template <int kBits, int kDims>
__device__ __forceinline__ void load_dense(const uint8_t* row, int first_dim, uint32_t bias,
                                           uint32_t (&out)[kExpandedWords<kBits, kDims>]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(row + first_dim * kBits / 8);
  if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < kDims / 8; i++) {
      out[2 * i] = spread_nibbles(words[i]) ^ bias;
      out[2 * i + 1] = spread_nibbles(words[i] >> 16) ^ bias;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kExpandedWords<kBits, kDims>; i++) out[i] = words[i] ^ bias;
  }
}

// Number of kept values of a row before dim `dim`. masks: the row's words.
__device__ __forceinline__ int kept_before(const uint32_t* masks, int dim) {
  int n = 0;
  for (int w = 0; w < dim / 32; w++) n += popcount(masks[w]);
  if (dim % 32 != 0) n += popcount(masks[dim / 32] & ((1u << dim % 32) - 1u));
  return n;
}

}  // namespace mustafar::cuda
