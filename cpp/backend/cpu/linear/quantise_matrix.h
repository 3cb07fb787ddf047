// Rounding of weight matrices, which the host does for every backend.
#pragma once

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "core/thread_pool.h"
#include "format/quantised_matrix.h"

namespace mustafar {

// Rounds a matrix as stored (f32, f16 or bf16) to the codes, f16 scales and f16 minimums of a shape
// that has those. Both are in host memory, `memory` of shape.bytes(). The processor must run `isa`;
// all of them compute the same bytes. False where a value is not finite or no f16 scale holds it.
bool quantise_matrix(const Matrix& stored, const QuantisedShape& shape, Isa isa, ThreadPool& pool,
                     void* memory);

}  // namespace mustafar
