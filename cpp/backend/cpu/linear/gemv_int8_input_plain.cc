// The plain product of a quantised matrix with integer activations: what the fast ones equal bit
// for bit, and what runs where there is none.
#include <algorithm>
#include <cmath>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

// v of input k.
int32_t input_at(const Int8Input& block, int32_t n, int32_t i, int64_t k) {
  const int8_t* codes = block.codes + (k / 4 * n + i) * block.planes * 4 + k % 4;
  return block.planes == 2 ? codes[0] * 128 + codes[4] : codes[0];
}

float row_sum(const Matrix& w, const QuantisedShape& shape, const Int8Input& block, int32_t n,
              int32_t i, int64_t row) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.data);
  float sum = 0.0f;
  for (int64_t c = 0; c < shape.inner();) {
    const int64_t at = scale_at(shape, row, std::min(c, w.cols - 1));
    const int64_t end = std::min(shape.inner(), c + w.group);
    float part = 0.0f, input_sum = 0.0f;
    for (; c < end; c += kInnerStep) {
      int32_t products = 0;
      for (int64_t k = c; k < c + kInnerStep; k++) {
        products += code_at(shape, codes, row, k) * input_at(block, n, i, k);
      }
      const int64_t step = c / kInnerStep * n + i;
      part = std::fma(static_cast<float>(products), block.scales[step], part);
      input_sum += block.scales[step] * static_cast<float>(block.sums[step]);
    }
    const float scale = load_float(w.scales, w.scale_dtype, at);
    if (w.offset == Offset::kMinimums) {
      sum = std::fma(part, scale, sum);
      sum = std::fma(load_float(w.offsets, w.scale_dtype, at), input_sum, sum);
    } else {
      part = std::fma(-static_cast<float>(w.zero(at)), input_sum, part);
      sum = std::fma(part, scale, sum);
    }
  }
  return sum;
}

}  // namespace

void gemv_int8_input_plain(const QuantisedGemvArgs& args) {
  const Matrix& w = *args.weights;
  const QuantisedShape shape = w.shape();
  for (int32_t b = 0; b < args.batch; b++) {
    const int32_t b0 = b / args.input.rows() * args.input.rows();
    const int32_t n = std::min(args.input.rows(), args.batch - b0);
    const Int8Input block = args.input.block(b0, shape.inner());
    for (int64_t row = args.row0; row < args.row1; row++) {
      args.store(row, b, row_sum(w, shape, block, n, b - b0, row));
    }
  }
}

}  // namespace mustafar
