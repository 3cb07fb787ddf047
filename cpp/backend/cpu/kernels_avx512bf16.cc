// GEMM and prefill attention with AVX512_BF16's dot product of bf16 pairs.
//
// The templates are over Simd, so the order of these includes matters.
// clang-format off
#include "backend/cpu/simd/avx512.h"
#include "backend/cpu/simd/math_impl.h"
#include "backend/cpu/linear/gemm_impl.h"
#include "backend/cpu/linear/gemm_step_bf16.h"
// clang-format on

namespace mustafar {

const GemmKernels& avx512bf16_gemm_kernels() {
  static const GemmKernels kernels = make_gemm_kernels<StepBF16>();
  return kernels;
}

}  // namespace mustafar
