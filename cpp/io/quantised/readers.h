// Readers of quantised matrices, one for each family of layouts. Each checks names, types and
// shapes of a module's tensors for a matrix [rows][cols] and returns the matrix, or null where the
// module is not quantised. They throw ModelError naming the tensor that is wrong.
#pragma once

#include <cstdint>
#include <memory>

#include "core/dtype.h"
#include "io/quantised/module_tensors.h"
#include "io/quantised/quantisation.h"
#include "io/quantised/stored_matrix.h"

namespace mustafar {

struct MatrixSize {
  int64_t rows = 0;  // outputs
  int64_t cols = 0;  // inputs
};

// weight_packed, weight_scale, weight_shape, weight_zero_point, weight_g_idx; or weight of int8.
std::unique_ptr<StoredMatrix> read_compressed_tensors(const Quantisation& quantisation,
                                                      MatrixSize size, ModuleTensors& tensors);
// qweight, qzeros, scales, g_idx.
std::unique_ptr<StoredMatrix> read_gptq(const Quantisation& quantisation, MatrixSize size,
                                        ModuleTensors& tensors);
// qweight, qzeros, scales of AutoAWQ's version "gemm".
std::unique_ptr<StoredMatrix> read_awq(const Quantisation& quantisation, MatrixSize size,
                                       ModuleTensors& tensors);
// weight of fp8 with weight_scale or weight_scale_inv, which both multiply. model: what the matrix
// is expanded to.
std::unique_ptr<StoredMatrix> read_fp8(const Quantisation& quantisation, MatrixSize size,
                                       DType model, ModuleTensors& tensors);

// The one that the folder's method calls for.
std::unique_ptr<StoredMatrix> read_stored_matrix(const Quantisation& quantisation, MatrixSize size,
                                                 DType model, ModuleTensors& tensors);

// Of the schemes for integers (or fp8) the first that shapes fit: the width of the packed codes (0:
// not packed) and the scales'. Where none does, the first of the kind, whose check then says what
// is wrong; null where there is none of the kind.
const QuantScheme* choose_scheme(const Quantisation& quantisation, bool is_float, MatrixSize size,
                                 int64_t packed_width, const std::vector<int64_t>& scales);

// The groups of inputs that an index [cols] gives: empty where they are those of neighbours. Throws
// ModelError where it names a group that there is not.
std::vector<int32_t> read_input_groups(const ModuleTensors& tensors, const StoredPart& index,
                                       int64_t group, int64_t n_groups);

}  // namespace mustafar
