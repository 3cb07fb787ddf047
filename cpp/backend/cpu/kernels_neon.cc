// The templates are over Simd, so the order of these includes matters.
// clang-format off
#include "backend/cpu/simd_neon.h"
#include "backend/cpu/simd_math_impl.h"
#include "backend/cpu/vector_ops_impl.h"
#include "backend/cpu/row_scores_impl.h"
#include "backend/cpu/gemv_impl.h"
#include "backend/cpu/gemm_impl.h"
#include "backend/cpu/kernels_table_impl.h"
// clang-format on

namespace mustafar {

const Kernels& neon_kernels() {
  static const Kernels kernels = make_kernels();
  return kernels;
}

}  // namespace mustafar
