// The small operations between the matrix products.
#pragma once

#include <cstdint>

#include "backend/cache_view.h"
#include "cuda/attention.h"
#include "cuda/device.h"

namespace mustafar::cuda {

// out [n][hidden] = rows token_ids [n] (device) of table [vocab][hidden].
void embed(const void* table, DType dtype, const int32_t* token_ids, int32_t n, int64_t hidden,
           float* out, Stream stream);

// out [n][hidden] = RMSNorm of x's rows (rows [n] on the device, or null: 0 .. n-1) times weight;
// add: out += that. out may be x where rows is null.
void rms_norm(const float* x, const int32_t* rows, const float* weight, float eps, int64_t n,
              int64_t hidden, float* out, Stream stream, bool add = false);

// The same of rows 0 .. n-1, rounded: out [n][hidden] in f16 or bf16.
void rms_norm_rounded(const float* x, const float* weight, float eps, int64_t n, int64_t hidden,
                      DType dtype, void* out, Stream stream);

// x [count] *= factor.
void scale(float* x, float factor, int64_t count, Stream stream);

// out [count] = silu(gate) * up in dtype, f32, f16 or bf16. f32: out may be gate. Arrays begin at
// 16-byte addresses.
void silu_multiply(const float* gate, const float* up, int64_t count, DType dtype, void* out,
                   Stream stream);

// Up to so many rows of a batch are rotated and transformed one by one, in f32; more of them
// together, matrices and values to within 2^-16 of every product, where the tail has 2 bytes.
constexpr int32_t kFewRows = 8;

struct RopeArgs {
  const SequenceView* sequences = nullptr;  // [n_sequences] on the device
  int32_t n_sequences = 0;
  int32_t n_rows = 0;
  int32_t layer = 0;
  int32_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  DType tail_dtype = DType::kBF16;
  bool rotates = true;                      // queries and keys
  int32_t rope_dims = 0;                    // of a head, the leading ones
  float rope_scale = 1;                     // of sines and cosines
  float query_scale = 1;                    // of queries, once they are rotated
  const float* frequencies = nullptr;       // [rope_dims / 2], radians per token
  const float* long_frequencies = nullptr;  // of sequences with long_rope, or null: the same
  float* q = nullptr;        // [n_rows][n_heads * head_dim], rotated and transformed in place
  const float* k = nullptr;  // [n_rows][n_kv_heads * head_dim]
  const float* v = nullptr;
};

// Rotary embedding of q and k, the KV transform, and the append of k and v, rounded to the tail's
// type, to the sequence's fresh buffer or its dense slot dense_tokens.
void rope_append(const RopeArgs& args, Stream stream);

// args.out times v_backward, in place, of the sequences that have one, each product to within
// 2^-16. Error unless undoes_values(head_dim).
void undo_value_transform(const AttentionArgs& args, Stream stream);
bool undoes_values(int32_t head_dim);

}  // namespace mustafar::cuda
