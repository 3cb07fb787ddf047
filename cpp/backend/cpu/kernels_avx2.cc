// The templates are over Simd, so the order of these includes matters.
// clang-format off
#include "backend/cpu/simd/avx2.h"
#include "backend/cpu/simd/math_impl.h"
#include "backend/cpu/simd/vector_ops_impl.h"
#include "backend/cpu/linear/row_scores_impl.h"
#include "backend/cpu/linear/gemv_impl.h"
#include "backend/cpu/linear/quantised_impl.h"
#include "backend/cpu/linear/gemm_impl.h"
#include "backend/cpu/kernels_table_impl.h"
// clang-format on

namespace mustafar {

const Kernels& avx2_kernels() {
  static const Kernels kernels = make_kernels();
  return kernels;
}

}  // namespace mustafar
