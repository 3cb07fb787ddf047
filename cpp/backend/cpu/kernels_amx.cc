// GEMM and prefill attention on AMX's tile registers: 16 rows of 64 bytes each, and a product of
// two tiles of bf16 pairs added to a tile of f32. The packed operands of gemm_impl.h are what the
// tiles hold: rows of bf16 pairs as inputs, sixteen outputs by sixteen steps of pairs as weights.
//
// The templates are over Simd, so the order of these includes matters.
// clang-format off
#include "backend/cpu/simd/avx512.h"
#include "backend/cpu/simd/math_impl.h"
#include "backend/cpu/linear/gemm_impl.h"
#include "backend/cpu/linear/gemm_step_bf16.h"
#include "backend/cpu/simd/amx.h"
// clang-format on

namespace mustafar {
namespace {

// Steps that don't fill a tile.
void add_steps(int32_t steps, const float* input, const float* weights, int32_t n_rows, float* c,
               int64_t c_stride) {
  for (int32_t r = 0; r < n_rows; r++) {
    float* y = c + r * c_stride;
    Simd::F sum0 = Simd::load(y), sum1 = Simd::load(y + Simd::kWidth);
    for (int32_t i = 0; i < steps; i++) {
      const Simd::F x = Simd::set1(input[r * kGemmStride + i]);
      sum0 = StepBF16::multiply_add(x, Simd::load(weights + i * kTileCols), sum0);
      sum1 = StepBF16::multiply_add(x, Simd::load(weights + i * kTileCols + Simd::kWidth), sum1);
    }
    Simd::store(y, sum0);
    Simd::store(y + Simd::kWidth, sum1);
  }
}

// Tiles 0 to 3 are the result, 4 and 5 inputs, 6 and 7 weights. kHalves: of sixteen rows each.
template <int kHalves>
void tile_halves(int32_t steps, const float* input, const float* weights, float* c,
                 int64_t c_stride, bool add) {
  constexpr int64_t kInputStride = kGemmStride * sizeof(float);
  constexpr int64_t kWeightStride = kTileCols * sizeof(float);
  const int64_t stride = c_stride * static_cast<int64_t>(sizeof(float));
  const float* lower = input + 16 * kGemmStride;
  float* c_lower = c + 16 * c_stride;
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    if constexpr (kHalves == 2) {
      _tile_loadd(2, c_lower, stride);
      _tile_loadd(3, c_lower + 16, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int32_t i = 0; i + kAmxWords <= steps; i += kAmxWords) {
    const float* w = weights + i * kTileCols;
    _tile_loadd(6, w, kWeightStride);
    _tile_loadd(4, input + i, kInputStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 16, kWeightStride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kHalves == 2) {
      _tile_loadd(5, lower + i, kInputStride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  if constexpr (kHalves == 2) {
    _tile_stored(2, c_lower, stride);
    _tile_stored(3, c_lower + 16, stride);
  }
}

struct StepAmx : StepBF16 {
  static constexpr int kRows = 32;
  static constexpr int kBestSteps = 128;  // a panel of inputs and one of weights fit L1
  static constexpr int kTaskCols = 256;   // so wide that reading inputs from L2 costs little
  static constexpr int kDepth = kAmxWords;
  static constexpr void (*kEnter)() = configure_amx;
  static constexpr void (*kLeave)() = release_amx;

  static void tile(int32_t steps, const float* input, const float* weights, int32_t n_rows,
                   float* c, int64_t c_stride, bool add) {
    if (n_rows > 16) {
      tile_halves<2>(steps, input, weights, c, c_stride, add);
    } else {
      tile_halves<1>(steps, input, weights, c, c_stride, add);
    }
    const int32_t whole = steps / kAmxWords * kAmxWords;
    if (whole < steps) {
      add_steps(steps - whole, input + whole, weights + whole * kTileCols, n_rows, c, c_stride);
    }
  }
};

}  // namespace

const GemmKernels& amx_gemm_kernels() {
  static const GemmKernels kernels = make_gemm_kernels<StepAmx>();
  return kernels;
}

}  // namespace mustafar
