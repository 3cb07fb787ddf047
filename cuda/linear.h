// y = W x (+ bias) on the device: GEMV for few rows, tensor-core GEMM for many. Matrices of codes
// are multiplied as they are for few rows, and expanded to values for many.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/backend.h"
#include "cuda/buffer.h"
#include "cuda/device.h"

namespace mustafar::cuda {

constexpr int32_t kMaxFused = 3;   // matrices of one GEMV launch
constexpr int32_t kGemvRows = 16;  // batch rows that GEMV takes at once

// One matrix of a launch.
struct LinearPart {
  const void* weights = nullptr;  // [rows][cols], or codes
  DType dtype = DType::kF32;      // f32, f16 or bf16; int8 or int4: as Matrix has them
  int64_t rows = 0;
  const float* bias = nullptr;  // [rows] or null
  float* y = nullptr;           // [n][y_stride]
  int64_t y_stride = 0;
  bool accumulate = false;  // y += instead of y =

  // Of codes alone (format/quantised_matrix.h).
  int32_t group = 0;
  DType scale_dtype = DType::kF16;
  Offset offset = Offset::kNone;
  const void* scales = nullptr;
  const void* offsets = nullptr;

  bool quantised() const { return !is_float(dtype); }
  // Whether one kernel multiplies by both.
  bool like(const LinearPart& other) const {
    if (dtype != other.dtype) return false;
    if (!quantised()) return true;
    const bool wide = scale_dtype == DType::kF32, other_wide = other.scale_dtype == DType::kF32;
    return offset == other.offset && wide == other_wide;
  }
};

// y = W x + bias, or y += that; y: [n][rows].
inline LinearPart part_of(const Matrix& w, const float* bias, float* y, bool add = false) {
  return {w.data, w.dtype, w.rows,        bias,     y,        w.rows,
          add,    w.group, w.scale_dtype, w.offset, w.scales, w.offsets};
}

struct LinearArgs {
  LinearPart parts[kMaxFused];
  int32_t n_parts = 0;
  int64_t cols = 0;          // of every part
  const float* x = nullptr;  // [n][cols]
  int32_t n = 0;             // rows of the batch

  // x rounded to the weights' type, or to the type that codes are expanded to, where it is at hand:
  // of the products on 2-byte operands alone, which else round x.
  const void* rounded = nullptr;

  // Of gemv alone: RMSNorm of x before, with these weights [cols] unless null; and with gated, two
  // parts of equal rows of which the first's y becomes silu(first) * second, the second's unused.
  const float* norm = nullptr;
  float eps = 0.0f;
  bool gated = false;
};

// f32 arithmetic, or what comes within 2^-17 of each product (gemv_tensor.cu); a row's result does
// not depend on what the other rows of the batch hold, but a row alone may take another kernel than
// one of several. The parts are alike.
void gemv(const LinearArgs& args, Stream stream);

// The same of matrices of codes by a plain kernel, in f32 arithmetic.
void gemv_codes_plain(const LinearArgs& args, Stream stream);

// The products of gemv with matrices of codes for some tens of rows of x, to the same accuracy: all
// that gemv does, reading the codes once for every 64 rows. A row's result does not depend on how
// many there are. scratch: of so many bytes.
bool gemm_quantised_takes(const LinearArgs& args);
int64_t gemm_quantised_scratch_bytes(const LinearArgs& args);
void gemm_quantised(const LinearArgs& args, void* scratch, Stream stream);

// Products of 2-byte operands, args.rounded and the weights, with f32 sums. Needs f16 or bf16
// weights and cols a multiple of 8 (gemm_takes).
bool gemm_takes(const LinearArgs& args);
void gemm(const LinearArgs& args, Stream stream);

// How many rows of a matrix of codes are expanded to 2-byte values at a time: 32 MiB of them, which
// stay in a GPU's L2 until they are multiplied. Whole tiles.
inline int64_t expanded_rows(int64_t cols) {
  constexpr int64_t kBytes = int64_t{32} << 20;
  return std::max(kBytes / (2 * cols * kTileRows), int64_t{1}) * kTileRows;
}

// out [rows][cols] = rows [first, first + rows) of a matrix of codes as values of dtype. first: a
// multiple of kTileRows.
void expand_codes(const LinearPart& part, int64_t cols, int64_t first, int64_t rows, DType dtype,
                  void* out, Stream stream);

// out [n][hidden] = rows token_ids [n] (device) of a table of codes.
void embed_codes(const LinearPart& table, const int32_t* token_ids, int32_t n, int64_t hidden,
                 float* out, Stream stream);

// packed [count] = x in f16 or bf16. Both begin at 16-byte addresses.
void round_to(DType dtype, const float* x, int64_t count, void* packed, Stream stream);

// y [n][y_stride] += bias [rows].
void add_bias(const float* bias, int64_t rows, int32_t n, float* y, int64_t y_stride,
              Stream stream);

}  // namespace mustafar::cuda
