// The plain product of a quantised matrix with int8 activations: what the fast ones equal bit for
// bit, and what runs where there is none.
#include <algorithm>
#include <cmath>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

float row_sum(const Matrix& w, const QuantisedShape& shape, const Int8Input& block, int32_t n,
              int32_t i, int64_t row) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.data);
  float sum = 0.0f;
  for (int64_t c = 0; c < shape.inner();) {
    const int64_t at = scale_at(shape, row, std::min(c, w.cols - 1));
    const int32_t zero = w.zeros != nullptr ? w.zeros[at] : middle_code(w.dtype);
    const int64_t end = std::min(shape.inner(), c + w.group);
    float part = 0.0f;
    for (; c < end; c += kInnerStep) {
      int32_t products = 0;
      for (int64_t k = c; k < c + kInnerStep; k++) {
        products +=
            (code_at(shape, codes, row, k) - zero) * block.codes[(k / 4 * n + i) * 4 + k % 4];
      }
      part = std::fma(static_cast<float>(products), block.scales[c / kInnerStep * n + i], part);
    }
    sum = std::fma(part, load_float(w.scales, w.scale_dtype, at), sum);
  }
  return sum;
}

}  // namespace

void gemv_int8_input_plain(const QuantisedGemvArgs& args) {
  const Matrix& w = *args.weights;
  const QuantisedShape shape = w.shape();
  for (int32_t b = 0; b < args.batch; b++) {
    const int32_t b0 = b / kInputBlock * kInputBlock;
    const int32_t n = std::min(kInputBlock, args.batch - b0);
    const Int8Input block = args.input.block(b0, shape.inner());
    for (int64_t row = args.row0; row < args.row1; row++) {
      args.store(row, b, row_sum(w, shape, block, n, b - b0, row));
    }
  }
}

}  // namespace mustafar
