// GPTQ: words of codes of 8 (or 4) neighbouring inputs, from the lowest bit up, [cols / 8][rows];
// zero points packed along the outputs, [groups][rows / 8]; scales [groups][rows].
//
// The first version of the format stores zero points minus one. Its writers subtract from whole
// words, so that where a zero point is 0 a borrow runs into the next one: readers add to whole
// words likewise, as the conversion to the second version does.
#include <algorithm>
#include <utility>

#include "io/quantised/readers.h"

namespace mustafar {
namespace {

class Gptq : public StoredMatrix {
 public:
  Gptq(const Quantisation& quantisation, MatrixSize size, ModuleTensors& tensors) {
    const QuantScheme& scheme = quantisation.schemes.front();
    bits = scheme.bits;
    group = scheme.group;
    const int64_t per_word = 32 / bits, groups = scheme.n_groups(size.cols);
    codes_ = tensors.take("qweight", {"I32"}, {(size.cols + per_word - 1) / per_word, size.rows});
    zero_words_ = (size.rows + per_word - 1) / per_word;
    zeros_ = tensors.take("qzeros", {"I32"}, {groups, zero_words_});
    has_zeros = true;
    if (quantisation.gptq_zeros_less_one) one_ = bits == 4 ? 0x11111111u : 0x01010101u;
    scales.data = tensors.take_scales("scales", {groups, size.rows}, scales.dtype).data;
    scales.row_stride = 1;
    scales.group_stride = size.rows;
    expanded = scales.dtype;
    if (quantisation.gptq_needs_index || tensors.has("g_idx")) {
      input_groups =
          read_input_groups(tensors, tensors.take("g_idx", {"I32"}, {size.cols}), group, groups);
    }
  }

  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    const int64_t per_word = 32 / bits;
    for (int64_t c = 0; c < cols; c += per_word) {
      for (int64_t r = 0; r < n; r++) {
        unpack_word(codes_.word(c / per_word * rows + row + r), bits, std::min(per_word, cols - c),
                    out + r * stride + c);
      }
    }
  }

  int32_t zero(int64_t row, int64_t g) const override {
    const int64_t per_word = 32 / bits;
    const uint32_t word = zeros_.word(g * zero_words_ + row / per_word) + one_;
    return static_cast<int32_t>(word >> (row % per_word * bits) & ((1u << bits) - 1));
  }

 private:
  StoredPart codes_, zeros_;
  int64_t zero_words_ = 0;  // of a group
  uint32_t one_ = 0;        // in every code of a word
};

}  // namespace

std::unique_ptr<StoredMatrix> read_gptq(const Quantisation& quantisation, MatrixSize size,
                                        ModuleTensors& tensors) {
  if (!tensors.has("qweight")) return nullptr;
  return std::make_unique<Gptq>(quantisation, size, tensors);
}

}  // namespace mustafar
