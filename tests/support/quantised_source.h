// Random tensors of a model, but for one matrix that is quantised in the source.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "model/weights.h"

namespace mustafar::testing {

inline constexpr const char* kQuantisedName = "model.layers.1.mlp.up_proj.weight";

// fp8 numbers [rows][cols] with one scale, 0.5: codes that are not kept.
class Float8Matrix final : public StoredMatrix {
 public:
  Float8Matrix(int64_t n_rows, int64_t n_cols) {
    rows = n_rows;
    cols = n_cols;
    bits = 8;
    is_float = true;
    scales.data = reinterpret_cast<const uint8_t*>(&scale_);
    scales.dtype = DType::kF32;
  }
  static uint8_t code(int64_t r, int64_t c) { return static_cast<uint8_t>((r * 31 + c * 7) % 120); }
  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    for (int64_t r = 0; r < n; r++) {
      for (int64_t c = 0; c < cols; c++) out[r * stride + c] = code(row + r, c);
    }
  }
  int32_t zero(int64_t, int64_t) const override { return 0; }

 private:
  const float scale_ = 0.5f;
};

// 4-bit integers [rows][cols] in groups of 32 with zero points and f32 scales: codes that are kept.
class Int4Matrix final : public StoredMatrix {
 public:
  Int4Matrix(int64_t n_rows, int64_t n_cols) {
    rows = n_rows;
    cols = n_cols;
    bits = 4;
    group = 32;
    has_zeros = true;
    for (int64_t i = 0; i < n_rows * n_groups(); i++) {
      scales_.push_back(0.01f + 0.001f * static_cast<float>(i % 50));
    }
    scales.data = reinterpret_cast<const uint8_t*>(scales_.data());
    scales.dtype = DType::kF32;
    scales.row_stride = n_groups();
    scales.group_stride = 1;
  }
  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    for (int64_t r = 0; r < n; r++) {
      for (int64_t c = 0; c < cols; c++) {
        out[r * stride + c] = static_cast<uint8_t>(((row + r) * 5 + c * 3) % 16);
      }
    }
  }
  int32_t zero(int64_t row, int64_t g) const override {
    return static_cast<int32_t>((row + 3 * g) % 17);
  }

 private:
  std::vector<float> scales_;
};

class PartlyQuantised final : public TensorSource {
 public:
  PartlyQuantised(const ModelConfig& config, std::unique_ptr<const StoredMatrix> matrix)
      : dense_(random_tensors(config, DType::kBF16, /*seed=*/3)), matrix_(std::move(matrix)) {}
  // Of Matrix, with the shape that the model has there.
  template <class Matrix>
  static std::shared_ptr<PartlyQuantised> with(const ModelConfig& config) {
    return std::make_shared<PartlyQuantised>(
        config, std::make_unique<Matrix>(config.intermediate_size, config.hidden_size));
  }

  bool has(const std::string& name) const override { return dense_->has(name); }
  StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    if (quantised(name) != nullptr) throw std::logic_error(name + " is quantised");
    return dense_->tensor(name, shape);
  }
  const StoredMatrix* quantised(const std::string& name) const override {
    return name == kQuantisedName ? matrix_.get() : nullptr;
  }
  bool any_quantised(const std::function<bool(const StoredMatrix&)>& test) const override {
    return test(*matrix_);
  }

 private:
  const std::unique_ptr<TensorSource> dense_;
  const std::unique_ptr<const StoredMatrix> matrix_;
};

// Every matrix of a model once, the same order for the same config.
inline std::vector<Matrix> matrices_of(const Weights& w) {
  std::vector<Matrix> all = {w.embedding};
  if (w.lm_head.data != w.embedding.data) all.push_back(w.lm_head);
  for (const LayerWeights& l : w.layers) {
    for (const Matrix& m : {l.q, l.k, l.v, l.o, l.gate, l.up, l.down}) all.push_back(m);
  }
  return all;
}

// The bytes of a matrix, without the padding between codes, scales and offsets.
inline std::string bytes_of(const Matrix& matrix) {
  const auto text = [](const void* at, int64_t bytes) {
    return std::string(static_cast<const char*>(at), static_cast<size_t>(bytes));
  };
  if (!matrix.quantised()) {
    return text(matrix.data, dtype_bytes(matrix.dtype, matrix.rows * matrix.cols));
  }
  const QuantisedShape shape = matrix.shape();
  return text(matrix.data, shape.scales_at()) +
         text(matrix.scales, dtype_bytes(shape.scale_dtype, shape.n_scales())) +
         text(matrix.offsets, shape.offset_bytes());
}

}  // namespace mustafar::testing
