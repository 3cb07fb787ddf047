// fp8 (e4m3) of compressed-tensors' "float-quantized" and of the method "fp8": numbers [rows][cols]
// with one scale, a scale for each row or for each block.
#include <cstring>
#include <utility>

#include "io/quantised/readers.h"

namespace mustafar {
namespace {

class Float8 : public StoredMatrix {
 public:
  Float8(const QuantScheme& scheme, const char* suffix, MatrixSize size, DType model,
         ModuleTensors& tensors) {
    bits = 8;
    is_float = true;
    group = scheme.group;
    expanded = model;
    codes_ = tensors.take("weight", {"F8_E4M3"}, {size.rows, size.cols});
    const std::vector<int64_t> shape = scheme.scale_shape(size.rows, size.cols);
    scales.data = tensors.take_scales(suffix, shape, scales.dtype).data;
    if (scheme.scales == QuantScheme::Scales::kTensor) return;
    scales.block_rows = scheme.block_rows;
    scales.row_stride = scheme.n_groups(size.cols);
    scales.group_stride = 1;
  }

  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    for (int64_t r = row; r < row + n; r++, out += stride) {
      std::memcpy(out, codes_.data + r * cols, static_cast<size_t>(cols));
    }
  }

  int32_t zero(int64_t, int64_t) const override { return 0; }

 private:
  StoredPart codes_;
};

}  // namespace

std::unique_ptr<StoredMatrix> read_fp8(const Quantisation& quantisation, MatrixSize size,
                                       DType model, ModuleTensors& tensors) {
  if (tensors.dtype("weight") != "F8_E4M3") return nullptr;
  const char* suffix = tensors.has("weight_scale") ? "weight_scale" : "weight_scale_inv";
  const QuantScheme* scheme = choose_scheme(quantisation, true, size, 0, tensors.shape(suffix));
  if (scheme == nullptr) {
    tensors.fail(tensors.take("weight"),
                 "holds fp8, which \"quantization_config\" does not speak of");
  }
  return std::make_unique<Float8>(*scheme, suffix, size, model, tensors);
}

}  // namespace mustafar
