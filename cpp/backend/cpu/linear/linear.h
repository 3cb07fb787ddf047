// Linear layers on the CPU: how products with weight matrices are split into tasks. Decode uses
// GEMV, prefill GEMM; within each, the order of a sum depends on the layer's inputs count alone.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/workspace.h"
#include "core/thread_pool.h"

namespace mustafar {

// out [batch][rows of w], out_stride apart, = or += w x + bias.
struct LinearLayer {
  const Matrix* weights = nullptr;
  const float* bias = nullptr;  // or null
  float* out = nullptr;
  int64_t out_stride = 0;
  bool add = false;
};

// Activations in a GEMM's packed form: [depth block][row panel][g.rows][kGemmStride] words.
class PackedInput {
 public:
  PackedInput(const GemmKernels& gemm, int64_t n_rows, int64_t n_cols, HostBuffer& storage);

  int64_t n_rows() const { return n_rows_; }
  int64_t n_cols() const { return n_cols_; }
  int64_t n_panels() const { return n_panels_; }
  int64_t n_blocks() const { return n_blocks_; }
  int32_t block_cols(int64_t block) const;  // inner elements of a depth block
  int32_t panel_rows(int64_t panel) const;
  const float* panel(int64_t block, int64_t panel) const;

  // Packs one panel; x: its first row.
  void pack(int64_t panel, const float* x, int64_t stride) const;

 private:
  const GemmKernels& gemm_;
  int64_t n_rows_, n_cols_, n_panels_, n_blocks_;
  float* data_;
};

// Rows whose activations stay in a core's cache while the weights go by.
inline constexpr int32_t kRowsAtOnce = 256;

// One parallel region for every kRowsAtOnce rows: every layer applied to x [batch] rows, x_stride
// apart. Where a layer is quantised, its activations are rounded to int8 (Int8Input) if
// `int8_input` is set.
void decode_linear(ThreadPool& pool, const Kernels& kernels, std::span<const LinearLayer> layers,
                   const float* x, int64_t x_stride, int32_t batch, bool int8_input,
                   CpuWorkspace& workspace);

// out [batch][intermediate] = silu(gate x + bias) * (up x + bias). Regions as above.
void decode_gate_up(ThreadPool& pool, const Kernels& kernels, const LayerWeights& layer,
                    const float* x, int32_t batch, float* out, bool int8_input,
                    CpuWorkspace& workspace);

// The same with GEMM.
void prefill_linear(ThreadPool& pool, const Kernels& kernels, const GemmKernels& gemm,
                    std::span<const LinearLayer> layers, const PackedInput& x,
                    CpuWorkspace& workspace);
void prefill_gate_up(ThreadPool& pool, const Kernels& kernels, const GemmKernels& gemm,
                     const LayerWeights& layer, const PackedInput& x, float* out,
                     CpuWorkspace& workspace);

}  // namespace mustafar
