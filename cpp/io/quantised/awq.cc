// AutoAWQ, version "gemm": a word holds the codes of 8 neighbouring outputs for one input,
// [cols][rows / 8]; zero points likewise, [groups][rows / 8]; scales [groups][rows]. From the
// lowest bits up a word has outputs 0, 2, 4, 6, 1, 3, 5, 7.
#include <algorithm>
#include <utility>

#include "io/quantised/readers.h"

namespace mustafar {
namespace {

constexpr int kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};  // of output r % 8

class Awq : public StoredMatrix {
 public:
  Awq(const Quantisation& quantisation, MatrixSize size, ModuleTensors& tensors) {
    const QuantScheme& scheme = quantisation.schemes.front();
    bits = 4;
    group = scheme.group;
    words_ = size.rows / 8;
    const int64_t groups = scheme.n_groups(size.cols);
    codes_ = tensors.take("qweight", {"I32"}, {size.cols, words_});
    if (size.rows % 8 != 0) {
      tensors.fail(codes_, "expected outputs in eights, found " + std::to_string(size.rows));
    }
    zeros_ = tensors.take("qzeros", {"I32"}, {groups, words_});
    has_zeros = true;
    scales.data = tensors.take_scales("scales", {groups, size.rows}, scales.dtype).data;
    scales.row_stride = 1;
    scales.group_stride = size.rows;
    expanded = scales.dtype;
  }

  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    for (int64_t c = 0; c < cols; c++) {
      for (int64_t r = row; r < row + n;) {
        const uint32_t word = codes_.word(c * words_ + r / 8);
        const int64_t end = std::min(row + n, (r / 8 + 1) * 8);
        for (; r < end; r++) out[(r - row) * stride + c] = code(word, r);
      }
    }
  }

  int32_t zero(int64_t row, int64_t g) const override {
    return code(zeros_.word(g * words_ + row / 8), row);
  }

 private:
  static uint8_t code(uint32_t word, int64_t r) {
    return static_cast<uint8_t>(word >> kShift[r % 8] & 15u);
  }

  StoredPart codes_, zeros_;
  int64_t words_ = 0;  // of an input
};

}  // namespace

std::unique_ptr<StoredMatrix> read_awq(const Quantisation& quantisation, MatrixSize size,
                                       ModuleTensors& tensors) {
  if (!tensors.has("qweight")) return nullptr;
  return std::make_unique<Awq>(quantisation, size, tensors);
}

}  // namespace mustafar
