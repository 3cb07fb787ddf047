// Attention of one new token per sequence over its compressed cache: flash-decoding on the CPU.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "core/buffer.h"
#include "core/dtype.h"
#include "core/thread_pool.h"

namespace mustafar {

struct DecodeAttentionArgs {
  int32_t layer = 0;
  int32_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  DType tail_dtype = DType::kF32;
  std::span<const SequenceStep> sequences;  // one row each, SequenceStep::row0
  const float* q = nullptr;                 // [rows][n_heads * head_dim], rotated and transformed
  float* out = nullptr;                     // [rows][n_heads * head_dim]
  // Queries and weights of two bytes even where one is enough (DecodeRun), as tests want them, and
  // as it is where the tail is f32.
  bool fine = false;
};

// Softmax attention over the store, the dense buffer and the new token in dense slot dense_tokens,
// scaled by 1 / sqrt(head_dim). The value back-transform is left to the caller. Of a layer with a
// window, blocks that lie before it are not read.
//
// A sequence is cut into fixed runs of tiles (64 tokens), chosen from its length alone, so that a
// result depends neither on the batch nor on the number of threads; runs of all sequences and KV
// heads, neighbouring heads together, are handed to the threads, and the last of a KV head to end
// combines its partial softmaxes.
void decode_attention(ThreadPool& pool, Isa isa, const DecodeAttentionArgs& args,
                      HostBuffer& scratch);

}  // namespace mustafar
