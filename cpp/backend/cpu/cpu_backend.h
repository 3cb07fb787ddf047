// The backend interface on the host processor.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/linear.h"
#include "backend/cpu/workspace.h"
#include "core/thread_pool.h"

namespace mustafar {

class CpuBackend final : public Backend {
 public:
  // dtype: f32, f16 or bf16, see BackendOptions. The processor must run `isa`.
  CpuBackend(const ModelConfig& config, DType dtype, int32_t threads, Isa isa);

  std::string device() const override { return "cpu"; }
  std::string description() const override;
  bool host_memory() const override { return true; }
  bool codes() const override { return true; }
  bool layers_may_differ() const override { return true; }
  bool expands() const override { return true; }
  ThreadPool* host_pool() override { return &pool_; }

  std::unique_ptr<DeviceMemory> allocate(int64_t bytes) override;
  void upload(void* device, const void* host, int64_t bytes) override;
  void download(void* host, const void* device, int64_t bytes) override;
  void copy(void* to, const void* from, int64_t bytes) override;
  int64_t available_bytes() const override;

  std::unique_ptr<Workspace> make_workspace() override;

  void embed(const Weights& weights, std::span<const int32_t> token_ids, float* out) override;
  void project_qkv(const Weights& weights, int32_t layer, const Batch& batch, const float* x,
                   float* q, Workspace& workspace) override;
  void attend(int32_t layer, const Batch& batch, const float* q, float* out,
              Workspace& workspace) override;
  void project_output(const Weights& weights, int32_t layer, const Batch& batch,
                      const float* attention, float* x, Workspace& workspace) override;
  void mlp(const Weights& weights, int32_t layer, const Batch& batch, float* x,
           Workspace& workspace) override;
  void logits(const Weights& weights, const Batch& batch, std::span<const int32_t> rows,
              const float* x, float* logits, Workspace& workspace) override;
  void score_rows(const float* logits, int64_t vocab, std::span<RowScore> rows,
                  Workspace& workspace) override;
  void commit(std::span<const CommitStep> steps, int32_t first_layer, int32_t n_layers,
              Workspace& workspace) override;
  void expand(const SequenceStep& step, int32_t block, const KVTransform& to, uint8_t* out,
              int32_t out_capacity) override;
  void synchronize() override {}

 private:
  // normed [n][hidden] = norm(x), in the workspace.
  const float* norm_rows(const float* x, const float* weight, int64_t n, int64_t hidden,
                         CpuWorkspace& workspace);
  // Whether the products of a batch with these matrices are decode's, and so of rounded activations
  // where the matrices are quantised.
  bool takes_rows(const Batch& batch, std::initializer_list<const Matrix*> matrices) const;
  // The GEMM's input from x [n][cols], in the workspace.
  PackedInput pack(const float* x, int64_t n, int64_t cols, CpuWorkspace& workspace);
  // Fills workspace.rope for the rows of a batch.
  void prepare_rope(const Weights& weights, const Batch& batch, CpuWorkspace& workspace);
  // x [n_heads][head_dim] = its norm, in place: of every head, or of all as one.
  void norm_heads(QkNorm kind, const float* weight, int32_t n_heads, float* x) const;
  // Norms of q and k, RoPE, KV transform and appending of one row, all heads. q, k, v: the row's
  // projections.
  void finish_row(const Weights& weights, int32_t layer, const SequenceStep& step, int32_t row,
                  const float* cos, const float* sin, float* q, float* k, float* v,
                  float* scratch) const;
  // x [n][hidden] += norm(branch), which is overwritten.
  void add_normed(float* branch, const float* weight, int64_t n, int64_t hidden, float* x);
  // Rounds and appends one kind's heads of a row.
  void store_row(int32_t layer, const SequenceStep& step, int32_t row, int32_t kind,
                 const float* x) const;

  Kernels kernels_;
  GemmKernels gemm_;  // of prefill: bf16 or f32
  bool int8_input_;   // of quantised matrices where takes_rows says so, unless arithmetic is f32
  Isa isa_;
  DType dtype_;
  float eps_;         // of norms of x, in the units that x has here (ModelConfig::stream_norm_eps)
  float branch_eps_;  // of all other norms
  int32_t n_heads_, n_kv_heads_, head_dim_, rope_dims_;
  ThreadPool pool_;
};

}  // namespace mustafar
