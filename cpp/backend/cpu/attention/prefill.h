// Causal attention of a prefill call, flash style: scores exist for one tile of queries and keys at
// a time. Keys come from the store (expanded tile by tile), the dense buffer and the call's own
// tokens.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/workspace.h"
#include "core/thread_pool.h"

namespace mustafar {

struct PrefillAttentionArgs {
  int32_t layer = 0;
  int32_t n_heads = 0;
  int32_t n_kv_heads = 0;
  int32_t head_dim = 0;
  DType tail_dtype = DType::kF32;
  std::span<const SequenceStep> sequences;
  const float* q = nullptr;  // [rows][n_heads * head_dim]
  float* out = nullptr;      // likewise, before the value back-transform
};

void prefill_attention(ThreadPool& pool, const Kernels& kernels, const GemmKernels& gemm,
                       const PrefillAttentionArgs& args, CpuWorkspace& workspace);

}  // namespace mustafar
