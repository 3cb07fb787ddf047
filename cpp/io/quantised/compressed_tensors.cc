// compressed-tensors, integers. Format "pack-quantized": `bits`-wide codes of neighbouring inputs
// fill int32 words from the lowest bit up, as unsigned numbers with the middle for 0. Zero points
// are packed the same way along the outputs. The other formats hold int8 numbers.
#include <algorithm>
#include <cstring>
#include <utility>

#include "io/quantised/readers.h"

namespace mustafar {
namespace {

// Zero points of int8 beside the scales, of those shape.
struct PlainZeros {
  const uint8_t* data = nullptr;
  int64_t block_rows = 1, row_stride = 0, group_stride = 0;

  int32_t at(int64_t r, int64_t g) const {
    return static_cast<int8_t>(data[r / block_rows * row_stride + g * group_stride]);
  }
};

class CompressedTensors : public StoredMatrix {
 public:
  int32_t zero(int64_t row, int64_t g) const override {
    if (packed_zeros_.data == nullptr) return plain_zeros_.at(row, g) + middle();
    const int64_t bit = row * bits;
    const uint32_t word = packed_zeros_.word(bit / 32 * n_groups() + g);
    return static_cast<int32_t>(word >> (bit % 32) & ((1u << bits) - 1));
  }

  void set_scales(const QuantScheme& scheme, MatrixSize size, ModuleTensors& tensors) {
    group = scheme.group;
    const StoredPart part =
        tensors.take_scales("weight_scale", scheme.scale_shape(size.rows, size.cols), scales.dtype);
    scales.data = part.data;
    expanded = scales.dtype;
    if (scheme.scales == QuantScheme::Scales::kTensor) return;
    scales.block_rows = scheme.block_rows;
    scales.row_stride = scheme.n_groups(size.cols);
    scales.group_stride = 1;
  }

  // Symmetric schemes may have zero points that older versions stored, which are 0.
  void set_zeros(const QuantScheme& scheme, MatrixSize size, ModuleTensors& tensors) {
    has_zeros = scheme.zero_points || tensors.has("weight_zero_point");
    if (!has_zeros) return;
    if (tensors.dtype("weight_zero_point") == "I32") {
      const int64_t n = (size.rows * bits + 31) / 32;
      packed_zeros_ = tensors.take("weight_zero_point", {"I32"}, {n, scheme.n_groups(size.cols)});
      return;
    }
    std::vector<int64_t> shape = scheme.scale_shape(size.rows, size.cols);
    if (tensors.shape("weight_zero_point").empty() && shape == std::vector<int64_t>{1}) shape = {};
    const StoredPart part = tensors.take("weight_zero_point", {"I8"}, shape);
    plain_zeros_ = {part.data, scales.block_rows, scales.row_stride, scales.group_stride};
  }

 private:
  StoredPart packed_zeros_;
  PlainZeros plain_zeros_;
};

class Packed : public CompressedTensors {
 public:
  Packed(const QuantScheme& scheme, MatrixSize size, ModuleTensors& tensors) {
    bits = scheme.bits;
    words_ = (size.cols * bits + 31) / 32;
    codes_ = tensors.take("weight_packed", {"I32"}, {size.rows, words_});
    set_scales(scheme, size, tensors);
    set_zeros(scheme, size, tensors);
    check_shape(size, tensors);
    if (tensors.has("weight_g_idx")) {
      input_groups = read_input_groups(tensors, tensors.take("weight_g_idx", {"I32"}, {size.cols}),
                                       scheme.group, scheme.n_groups(size.cols));
    }
  }

  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    const int64_t per_word = 32 / bits;
    for (int64_t r = row; r < row + n; r++, out += stride) {
      for (int64_t c = 0; c < cols; c += per_word) {
        unpack_word(codes_.word(r * words_ + c / per_word), bits, std::min(per_word, cols - c),
                    out + c);
      }
    }
  }

 private:
  // weight_shape says again what the config does; it must not say otherwise.
  static void check_shape(MatrixSize size, ModuleTensors& tensors) {
    const StoredPart part = tensors.take("weight_shape");
    int64_t found[2] = {-1, -1};
    if ((part.dtype != "I64" && part.dtype != "I32") || part.shape != std::vector<int64_t>{2}) {
      tensors.fail(part, "expected two values of I64 or I32");
    }
    part.prepare();
    for (int i = 0; i < 2; i++) {
      if (part.dtype == "I64") {
        std::memcpy(&found[i], part.data + 8 * i, 8);
      } else {
        found[i] = static_cast<int32_t>(part.word(i));
      }
    }
    if (found[0] != size.rows || found[1] != size.cols) {
      tensors.fail(part, "expected the values " + std::to_string(size.rows) + ", " +
                             std::to_string(size.cols) + ", found " + std::to_string(found[0]) +
                             ", " + std::to_string(found[1]));
    }
  }

  StoredPart codes_;
  int64_t words_ = 0;  // of a row
};

class Plain : public CompressedTensors {
 public:
  Plain(const QuantScheme& scheme, MatrixSize size, ModuleTensors& tensors) {
    bits = 8;  // of what is stored, whatever the range in use
    codes_ = tensors.take("weight", {"I8"}, {size.rows, size.cols});
    set_scales(scheme, size, tensors);
    set_zeros(scheme, size, tensors);
  }

  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    for (int64_t r = row; r < row + n; r++, out += stride) {
      const uint8_t* from = codes_.data + r * cols;
      for (int64_t c = 0; c < cols; c++) out[c] = from[c] ^ 0x80;  // from -128 .. 127
    }
  }

 private:
  StoredPart codes_;
};

}  // namespace

std::unique_ptr<StoredMatrix> read_compressed_tensors(const Quantisation& quantisation,
                                                      MatrixSize size, ModuleTensors& tensors) {
  const bool packed = tensors.has("weight_packed");
  if (!packed && tensors.dtype("weight") != "I8") return nullptr;
  const std::vector<int64_t> shape = tensors.shape("weight_packed");
  const QuantScheme* scheme = choose_scheme(
      quantisation, false, size, shape.empty() ? 0 : shape.back(), tensors.shape("weight_scale"));
  if (scheme == nullptr) {
    tensors.fail(tensors.take(packed ? "weight_packed" : "weight"),
                 "holds integers, which no group of the config's \"config_groups\" speaks of");
  }
  if (packed) return std::make_unique<Packed>(*scheme, size, tensors);
  return std::make_unique<Plain>(*scheme, size, tensors);
}

}  // namespace mustafar
