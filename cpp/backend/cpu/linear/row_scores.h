// Log-softmax of rows of logits and what scoring a text wants of it, on the host.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "core/thread_pool.h"

namespace mustafar {

// logits [rows.size()][vocab], host: Backend::score_rows.
void score_host_rows(ThreadPool& pool, const Kernels& kernels, const float* logits, int64_t vocab,
                     std::span<RowScore> rows);

}  // namespace mustafar
