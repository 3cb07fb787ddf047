// Quantised weights as arrays, for tests against the reference.
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/linear/quantise_matrix.h"
#include "bindings.h"
#include "core/buffer.h"
#include "io/checkpoint.h"
#include "model/stored_weights.h"
#include "model/weight_format.h"

namespace py = pybind11;

namespace mustafar {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

py::tuple quantise_weights(const Floats& weights, const std::string& name) {
  const WeightFormat format = parse_weight_format(name);
  if (format.as_stored || weights.ndim() != 2 || weights.size() == 0) {
    throw std::invalid_argument("expected a matrix of weights and a format such as \"int4:32\"");
  }
  const int64_t rows = weights.shape(0), cols = weights.shape(1);
  const QuantisedShape shape = format.shape(rows, cols);
  HostBuffer memory(static_cast<size_t>(shape.bytes()));
  ThreadPool pool(2);
  const Matrix stored{weights.data(), DType::kF32, rows, cols};
  if (!quantise_matrix(stored, shape, detect_isa(), pool, memory.data())) {
    throw std::invalid_argument("weights that are not finite, or whose range is none of f16");
  }
  const uint8_t* const at = memory.as<uint8_t>();
  const auto* scales = reinterpret_cast<const uint16_t*>(at + shape.scales_at());
  const auto* minimums = reinterpret_cast<const uint16_t*>(at + shape.offsets_at());
  py::array_t<uint8_t> codes({rows, cols});
  py::array_t<uint16_t> halves({rows, shape.n_groups()}), firsts({rows, shape.n_groups()});
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < cols; c++) {
      codes.mutable_at(r, c) = static_cast<uint8_t>(code_at(shape, at, r, c));
      halves.mutable_at(r, c / shape.group) = scales[scale_at(shape, r, c)];
      firsts.mutable_at(r, c / shape.group) = minimums[scale_at(shape, r, c)];
    }
  }
  return py::make_tuple(codes, halves.attr("view")("float16"), firsts.attr("view")("float16"));
}

// A matrix of a quantised folder as it is kept, and how that is: "" for one that is not quantised.
py::tuple folder_matrix(const std::string& folder, const std::string& name) {
  const Checkpoint checkpoint = Checkpoint::open(folder);
  const StoredMatrix* stored = checkpoint.find_quantised(name);
  if (stored == nullptr) return py::make_tuple(py::none(), "");
  const int64_t rows = stored->rows, cols = stored->cols;
  py::array_t<float> values({rows, cols});
  if (!keeps_codes(*stored)) {
    std::vector<uint8_t> memory(dtype_bytes(stored->expanded, rows * cols));
    expand(*stored, 0, rows, nullptr, memory.data());
    for (int64_t i = 0; i < rows * cols; i++) {
      values.mutable_data()[i] = load_float(memory.data(), stored->expanded, i);
    }
    return py::make_tuple(values, describe_kept(*stored));
  }
  const QuantisedShape shape = code_shape(*stored, rows);
  std::vector<uint8_t> memory(shape.bytes());
  ThreadPool pool(2);
  unpack_codes(*stored, 0, shape, &pool, memory.data());
  const Matrix matrix = Matrix::of(shape, memory.data());
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < cols; c++) {
      values.mutable_at(r, c) =
          matrix.weight(code_at(shape, memory.data(), r, c), scale_at(shape, r, c));
    }
  }
  return py::make_tuple(values, describe_kept(*stored));
}

}  // namespace

void register_weights(py::module_& m) {
  m.def("quantise_weights", &quantise_weights, py::arg("weights"), py::arg("format"),
        "Codes [rows, cols] uint8, scales and minimums [rows, groups] float16 of a matrix as "
        "loading\n"
        "it with these weights rounds it.");
  m.def(
      "folder_matrix", &folder_matrix, py::arg("folder"), py::arg("name"),
      "The weights [rows, cols] float32 of a quantised folder's matrix as they are kept, and what\n"
      "is kept; None and \"\" where the matrix is not quantised.");
}

}  // namespace mustafar
