#include "model/weight_format.h"

#include <stdexcept>

namespace mustafar {
namespace {

constexpr int32_t kDefaultGroup = 32;
constexpr int32_t kGroups[] = {32, 64, 128};

}  // namespace

WeightFormat WeightFormat::for_vocabulary() const {
  WeightFormat format = *this;
  if (dtype != DType::kInt8) {
    format.dtype = DType::kInt8;
    format.group = kDefaultGroup;
  }
  return format;
}

QuantisedShape WeightFormat::shape(int64_t rows, int64_t cols) const {
  QuantisedShape shape;
  shape.dtype = dtype;
  shape.offset = Offset::kMinimums;
  shape.rows = rows;
  shape.cols = cols;
  shape.group = group > 0 ? group : static_cast<int32_t>(shape.inner());
  return shape;
}

std::string WeightFormat::name() const {
  if (as_stored) return "auto";
  return std::string(dtype_name(dtype)) + ":" + (group > 0 ? std::to_string(group) : "row");
}

WeightFormat parse_weight_format(const std::string& text) {
  WeightFormat format;
  if (text == "auto") return format;
  format.as_stored = false;
  for (const DType dtype : {DType::kInt8, DType::kInt4}) {
    format.dtype = dtype;
    format.group = kDefaultGroup;
    if (text == dtype_name(dtype)) return format;
    for (const int32_t group : kGroups) {
      format.group = group;
      if (text == format.name()) return format;
    }
    format.group = 0;
    if (text == format.name()) return format;
  }
  throw std::invalid_argument("weights is \"" + text +
                              "\", must be auto, int8 or int4, or one of these with a group: "
                              ":32, :64, :128 or :row, as in int4:64");
}

}  // namespace mustafar
