// The block format on numpy arrays: _core.SlotLayout, pack_rows and unpack_rows, under
// mustafar.compress and mustafar.decompress, which check shapes and ranges.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "format/block_format.h"
#include "format/coded.h"
#include "format/pack.h"
#include "format/prune.h"
#include "gil.h"

namespace py = pybind11;

namespace mustafar {
namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;
using BoolArray = py::array_t<bool, py::array::c_style | py::array::forcecast>;

// Ragged slots count values in 16 bits: 64 * 1023 of them at most.
constexpr int32_t kLargestHeadDim = 1023;

void check_head_dim(int32_t head_dim) {
  if (head_dim < 1 || head_dim > kLargestHeadDim) {
    throw std::invalid_argument("head_dim must be in [1, " + std::to_string(kLargestHeadDim) +
                                "], not " + std::to_string(head_dim));
  }
}

DType parse_value_dtype(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kInt8, DType::kInt4}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("value_dtype must be f32, f16, bf16, int8 or int4, not '" + name +
                              "'");
}

SlotLayout make_layout(int32_t head_dim, bool is_key, double sparsity, bool group_pattern,
                       const std::string& dtype, bool ragged) {
  check_head_dim(head_dim);
  if (!(sparsity >= 0.0 && sparsity < 1.0)) {
    throw std::invalid_argument("sparsity must be in [0, 1), not " + std::to_string(sparsity));
  }
  return make_slot_layout(head_dim, is_key, sparsity, group_pattern, parse_value_dtype(dtype),
                          ragged);
}

SlotLayout make_coded(int32_t head_dim, double bits) {
  check_head_dim(head_dim);
  if (!(bits >= 1.0 && bits <= 7.0)) {
    throw std::invalid_argument("bits must be in [1, 7], not " + std::to_string(bits));
  }
  return make_coded_layout(head_dim, bits);
}

// Widths of a head whose standard deviations are sigma [head_dim].
std::vector<uint8_t> widths_of(const SlotLayout& layout, const FloatArray& sigma) {
  if (layout.dtype != DType::kCoded || sigma.ndim() != 1 || sigma.size() != layout.head_dim) {
    throw std::invalid_argument("sigma does not fit the layout");
  }
  std::vector<uint8_t> widths(layout.head_dim);
  deal_widths(sigma.data(), layout.head_dim, layout.row_bytes, widths.data());
  return widths;
}

// rows: [n * 64][head_dim]. Returns [n][slot_bytes].
ByteArray pack_coded_rows(const SlotLayout& layout, const FloatArray& rows,
                          const FloatArray& sigma) {
  const std::vector<uint8_t> widths = widths_of(layout, sigma);
  if (rows.ndim() != 2 || rows.shape(0) % kBlockTokens != 0 || rows.shape(1) != layout.head_dim) {
    throw std::invalid_argument("rows do not fit the layout");
  }
  const int64_t n = rows.shape(0) / kBlockTokens;
  ByteArray out({n, int64_t{layout.slot_bytes}});
  const float* x = rows.data();
  uint8_t* slots = out.mutable_data();
  const CodeTable table = {widths.data(), sigma.data()};
  ReleaseGil release;
  for (int64_t b = 0; b < n; b++) {
    const int32_t bad = pack_coded_block(layout, table, x + b * kBlockTokens * layout.head_dim,
                                         slots + b * layout.slot_bytes);
    if (bad >= 0) {
      throw std::invalid_argument("row " + std::to_string(b * kBlockTokens + bad) +
                                  " is not finite and can't be stored as coded");
    }
  }
  return out;
}

// slots: [n][slot_bytes]. Returns [n * 64][head_dim].
FloatArray unpack_coded_rows(const SlotLayout& layout, const ByteArray& slots,
                             const FloatArray& sigma) {
  const std::vector<uint8_t> widths = widths_of(layout, sigma);
  if (slots.ndim() != 2 || slots.shape(1) != layout.slot_bytes) {
    throw std::invalid_argument("slots do not fit the layout");
  }
  const int64_t n = slots.shape(0);
  FloatArray out({n * kBlockTokens, int64_t{layout.head_dim}});
  const uint8_t* data = slots.data();
  float* x = out.mutable_data();
  const CodeTable table = {widths.data(), sigma.data()};
  ReleaseGil release;
  for (int64_t b = 0; b < n; b++) {
    unpack_coded_slot(layout, table, data + b * layout.slot_bytes,
                      x + b * kBlockTokens * layout.head_dim);
  }
  return out;
}

// In stored order. rows: [n * 64][head_dim]; mask: the same shape, for ragged layouts; weight:
// [head_dim]. Returns [n][slot_bytes].
ByteArray pack_rows(const SlotLayout& layout, const FloatArray& rows,
                    const std::optional<BoolArray>& mask, const std::optional<FloatArray>& weight) {
  if (rows.ndim() != 2 || rows.shape(0) % kBlockTokens != 0 || rows.shape(1) != layout.head_dim ||
      (mask && (mask->ndim() != 2 || mask->size() != rows.size())) ||
      (weight && weight->size() != layout.head_dim) || (layout.ragged && !mask)) {
    throw std::invalid_argument("rows, mask and weight do not fit the layout");
  }
  const int64_t n = rows.shape(0) / kBlockTokens;
  ByteArray out({n, int64_t{layout.slot_bytes}});
  const float* x = rows.data();
  const bool* kept = mask ? mask->data() : nullptr;
  const float* ranked = weight ? weight->data() : nullptr;
  uint8_t* slots = out.mutable_data();
  ReleaseGil release;
  std::vector<uint32_t> masks(size_t{kBlockTokens} * layout.mask_words);
  for (int64_t b = 0; b < n; b++) {
    const int64_t first = b * kBlockTokens * layout.head_dim;
    if (layout.ragged) {
      masks.assign(masks.size(), 0);
      for (int32_t i = 0; i < kBlockTokens * layout.head_dim; i++) {
        const int32_t t = i / layout.head_dim, d = i % layout.head_dim;
        if (kept[first + i]) masks[t * layout.mask_words + d / 32] |= uint32_t{1} << (d % 32);
      }
    } else if (!layout.dense) {
      for (int32_t t = 0; t < kBlockTokens; t++) {
        select_row(layout, x + first + int64_t{t} * layout.head_dim, ranked,
                   masks.data() + t * layout.mask_words);
      }
    }
    const int32_t bad = pack_block(layout, x + first, masks.data(), slots + b * layout.slot_bytes);
    if (bad >= 0) {
      throw std::invalid_argument("row " + std::to_string(b * kBlockTokens + bad) +
                                  " is not finite and can't be stored as " +
                                  dtype_name(layout.dtype));
    }
  }
  return out;
}

// slots: [n][slot_bytes]. Returns [n * 64][head_dim], in stored order.
FloatArray unpack_rows(const SlotLayout& layout, const ByteArray& slots) {
  if (slots.ndim() != 2 || slots.shape(1) != layout.slot_bytes) {
    throw std::invalid_argument("slots do not fit the layout");
  }
  const int64_t n = slots.shape(0);
  FloatArray out({n * kBlockTokens, int64_t{layout.head_dim}});
  const uint8_t* data = slots.data();
  float* x = out.mutable_data();
  ReleaseGil release;
  for (int64_t b = 0; b < n; b++) {
    unpack_slot(layout, data + b * layout.slot_bytes, x + b * kBlockTokens * layout.head_dim);
  }
  return out;
}

}  // namespace

void register_format(py::module_& m) {
  py::class_<SlotLayout>(m, "SlotLayout", "Byte layout of 64 tokens of one KV head, K or V.")
      .def(py::init(&make_layout), py::arg("head_dim"), py::arg("is_key"), py::arg("sparsity"),
           py::arg("group_pattern"), py::arg("value_dtype"), py::arg("ragged") = false)
      .def_readonly("head_dim", &SlotLayout::head_dim)
      .def_readonly("group", &SlotLayout::group, "Dims ranked together.")
      .def_readonly("keep", &SlotLayout::keep, "Values kept of each group.")
      .def_readonly("row_keep", &SlotLayout::row_keep, "Values kept of each row.")
      .def_readonly("dense", &SlotLayout::dense)
      .def_readonly("ragged", &SlotLayout::ragged)
      .def_readonly("mask_words", &SlotLayout::mask_words, "uint32 words of a row's mask.")
      .def_readonly("row_bytes", &SlotLayout::row_bytes, "Bytes of a row's values.")
      .def_readonly("values_offset", &SlotLayout::values_offset)
      .def_readonly("scales_offset", &SlotLayout::scales_offset)
      .def_readonly("slot_bytes", &SlotLayout::slot_bytes)
      .def_property_readonly(
          "order",
          [](const SlotLayout& layout) {
            py::array_t<int64_t> order(layout.head_dim);
            for (int32_t d = 0; d < layout.head_dim; d++) {
              order.mutable_at(stored_index(d, n_groups(layout), layout.head_dim)) = d;
            }
            return order;
          },
          "Which dim of a row stands at each stored index, int64 [head_dim].")
      .def_property_readonly("value_dtype",
                             [](const SlotLayout& layout) { return dtype_name(layout.dtype); });
  m.def("coded_layout", &make_coded, py::arg("head_dim"), py::arg("bits"));
  m.def("pack_coded_rows", &pack_coded_rows, py::arg("layout"), py::arg("rows"), py::arg("sigma"));
  m.def("unpack_coded_rows", &unpack_coded_rows, py::arg("layout"), py::arg("slots"),
        py::arg("sigma"));
  m.def("pack_rows", &pack_rows, py::arg("layout"), py::arg("rows"), py::arg("mask") = py::none(),
        py::arg("weight") = py::none());
  m.def("unpack_rows", &unpack_rows, py::arg("layout"), py::arg("slots"));
}

}  // namespace mustafar
