#include "io/quantised/readers.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace mustafar {

std::unique_ptr<StoredMatrix> read_stored_matrix(const Quantisation& quantisation, MatrixSize size,
                                                 DType model, ModuleTensors& tensors) {
  using Method = Quantisation::Method;
  std::unique_ptr<StoredMatrix> matrix;
  switch (quantisation.method) {
    case Method::kNone:
      return nullptr;
    case Method::kCompressedTensors:
      matrix = read_compressed_tensors(quantisation, size, tensors);
      break;
    case Method::kGptq:
      matrix = read_gptq(quantisation, size, tensors);
      break;
    case Method::kAwq:
      matrix = read_awq(quantisation, size, tensors);
      break;
    case Method::kFp8:
      break;
  }
  if (matrix == nullptr) matrix = read_fp8(quantisation, size, model, tensors);
  if (matrix != nullptr) {
    matrix->rows = size.rows;
    matrix->cols = size.cols;
    matrix->parts = tensors.taken();
  }
  return matrix;
}

const QuantScheme* choose_scheme(const Quantisation& quantisation, bool is_float, MatrixSize size,
                                 int64_t packed_width, const std::vector<int64_t>& scales) {
  const auto values = [](const std::vector<int64_t>& shape) {
    uint64_t n = 1;  // a file's shapes may be anything
    for (const int64_t dim : shape) n *= static_cast<uint64_t>(dim);
    return n;
  };
  const QuantScheme* first = nullptr;
  for (const QuantScheme& scheme : quantisation.schemes) {
    if (scheme.is_float != is_float) continue;
    if (first == nullptr) first = &scheme;
    if (packed_width > 0 && packed_width != (size.cols * scheme.bits + 31) / 32) continue;
    if (values(scheme.scale_shape(size.rows, size.cols)) == values(scales)) return &scheme;
  }
  return first;
}

std::vector<int32_t> read_input_groups(const ModuleTensors& tensors, const StoredPart& index,
                                       int64_t group, int64_t n_groups) {
  index.prepare();
  const int64_t cols = index.shape[0];
  std::vector<int32_t> groups;
  for (int64_t c = 0; c < cols; c++) groups.push_back(static_cast<int32_t>(index.word(c)));
  // compressed-tensors writes -1 throughout for an index that was not used.
  if (std::all_of(groups.begin(), groups.end(), [](int32_t g) { return g == -1; })) return {};
  bool of_neighbours = true;
  for (int64_t c = 0; c < cols; c++) {
    const int32_t g = groups[static_cast<size_t>(c)];
    of_neighbours = of_neighbours && g == (group > 0 ? c / group : 0);
    if (g < 0 || g >= n_groups) {
      tensors.fail(index, "input " + std::to_string(c) + " is in group " + std::to_string(g) +
                              ", expected 0 to " + std::to_string(n_groups - 1));
    }
  }
  if (of_neighbours) return {};
  return groups;
}

}  // namespace mustafar
