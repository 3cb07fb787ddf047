// The sizes of coded rows in every layer.
#pragma once

#include <cstdint>
#include <vector>

namespace mustafar {

struct RowSizes {
  std::vector<int32_t> k_row_bytes, v_row_bytes;  // [n_layers]
  double predicted_kld = 0;                       // nats a token; 0 where nothing was predicted
};

}  // namespace mustafar
