// Blocks of a store, and dense rows, as dense rows of another basis (Backend::expand).
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "core/thread_pool.h"

namespace mustafar {

// tail_dtype: of the dense rows, those of the step and those of out. A basis that both have is left
// alone: then dense rows keep their bits, and a block's are what its slots hold, rounded.
void expand_rows(ThreadPool& pool, const Kernels& kernels, DType tail_dtype,
                 const SequenceStep& step, int32_t block, const KVTransform& to, uint8_t* out,
                 int32_t out_capacity);

}  // namespace mustafar
