// The types that a model's matrices may be given when it is loaded.
#pragma once

#include <cstdint>
#include <string>

#include "format/quantised_matrix.h"

namespace mustafar {

struct WeightFormat {
  bool as_stored = true;
  DType dtype = DType::kInt8;  // of the codes: kInt8 or kInt4
  int32_t group = 0;           // inputs that share a scale; 0: a whole row

  // The embedding and the head, one matrix where they are tied: int8 where the others are int4.
  WeightFormat for_vocabulary() const;
  QuantisedShape shape(int64_t rows, int64_t cols) const;  // f16 scales and minimums
  std::string name() const;                                // "auto", or as in "int4:32"
};

// "auto", "int8" or "int4"; with a group as in "int4:64" or "int8:row". Throws
// std::invalid_argument for anything else.
WeightFormat parse_weight_format(const std::string& text);

}  // namespace mustafar
