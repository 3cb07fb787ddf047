// Tensor-core products and the movements of matrices in fragments: like device_ops.cuh, PTX under
// nvcc and calls of the harness elsewhere.
//
// What a lane holds, with g = lane / 4 and c = lane % 4:
//
//   2-byte shape  A [16][16]  a0: row g, columns 2c and 2c+1; a1: row g+8; a2: columns +8; a3: both
//                 B [16][8]   b0: rows 2c and 2c+1, column g; b1: rows +8
//   1-byte shape  A [16][32]  a0: row g, columns 4c .. 4c+3; a1: row g+8; a2: columns +16; a3: both
//                 B [32][8]   b0: rows 4c .. 4c+3, column g; b1: rows +16
//   either        C [16][8]   c0, c1: row g, columns 2c and 2c+1; c2, c3: row g+8
#pragma once

#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

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
