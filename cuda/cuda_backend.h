// The backend interface on one NVIDIA GPU of the machine. Every call makes that device current to
// its thread and leaves the thread as it was, so that models on several devices, and what else a
// program does on them, are used from any thread.
//
// All work goes into one stream, in the order of the calls; threads that share a model take turns
// at issuing it. Ops do not wait for the device: only download, upload and synchronize do.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "cuda/attention.h"
#include "cuda/buffer.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "cuda/linear.h"
#include "cuda/memory_pool.h"
#include "cuda/top_logits.h"
#include "cuda/workspace.h"

namespace mustafar::cuda {

class CudaBackend final : public Backend {
 public:
  // dtype: f32, f16 or bf16, see BackendOptions. device: a GPU's number, see DeviceName. Throws
  // Error saying what is missing.
  CudaBackend(const ModelConfig& config, DType dtype, int32_t device);
  ~CudaBackend() override;

  std::string device() const override;
  std::string description() const override;
  bool host_memory() const override { return false; }
  int64_t prefill_rows() const override { return 2048; }
  bool codes() const override { return true; }

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
  int32_t max_top_logits() const override { return kMaxTopLogits; }
  void top_logits(const float* logits, int64_t vocab, int32_t k, std::span<TopLogits> out,
                  Workspace& workspace) override;
  void commit(std::span<const CommitStep> steps, int32_t first_layer, int32_t n_layers,
              Workspace& workspace) override;
  void synchronize() override;

  // The second step of a shape is recorded as a graph, later ones replay it.
  void decode_step(const Batch& batch, std::span<const int32_t> token_ids,
                   std::span<const void* const> buffers, Workspace& workspace,
                   const std::function<void()>& body) override;

 private:
  // What a recorded step depends on beyond device memory.
  struct StepKey {
    std::vector<const void*> buffers;
    int32_t n_rows = 0;
    int32_t max_splits = 0;
    // Neighbours of one layout share launches. In order: the layout, how many sequences have it.
    std::vector<std::pair<StoreLayout, int32_t>> runs;
    std::vector<DecodeLoad> loads;  // of the runs
    bool magnitudes = false;        // |q| is recorded for some sequence's pruning
    bool operator==(const StepKey&) const = default;
  };
  struct RecordedStep {
    StepKey key;
    Graph graph = nullptr;
  };
  // The calling thread issues into the stream; nested where decode_step's body calls ops.
  class Turn {
   public:
    explicit Turn(CudaBackend& backend) : lock_(backend.mutex_), scope_(backend.device_) {}

   private:
    const std::lock_guard<std::recursive_mutex> lock_;
    const DeviceScope scope_;
  };

  // Few rows go through gemv, some tens of rows and matrices of codes through gemm_quantised; for
  // more, and for matrices that are not alike, what those do at once is done in steps around
  // multiply.
  void linear(const LinearArgs& whole, bool decode, CudaWorkspace& workspace);
  bool by_gemv(const LinearArgs& args, bool decode) const;
  bool by_gemm_quantised(const LinearArgs& args) const;
  // By one of the two; false where neither is for these args.
  bool in_one_step(const LinearArgs& args, bool decode, CudaWorkspace& workspace);
  // Whether linear() takes the matrices together, rounds x and multiplies.
  bool by_multiply(const LinearArgs& args, bool decode) const;
  // The type that x is rounded to for a product with this matrix.
  DType operand_dtype(const LinearPart& part) const;
  // The products alone, by tensor cores: only the matrices, biases and x of args count.
  void multiply(const LinearArgs& args, CudaWorkspace& workspace);
  // The same of one matrix and args.rounded. Codes are expanded some rows at a time, few enough to
  // stay in a GPU's L2.
  void multiply_codes(const LinearArgs& args, const LinearPart& part, CudaWorkspace& workspace);
  void multiply_values(const LinearArgs& args, const LinearPart& part, CudaWorkspace& workspace);
  // RMSNorm of rows (device; null: the first n) of x, in the workspace.
  const float* normalise(const float* x, const float* weight, const int32_t* rows, int32_t n,
                         int64_t hidden, CudaWorkspace& workspace);
  void norm_heads(QkNorm kind, const float* weight, int32_t n_heads, int32_t n_rows, float* x);
  // x += the product of part, normed where there is a norm.
  void add_branch(const LinearArgs& product, const float* norm, int64_t hidden, bool decode,
                  CudaWorkspace& workspace);
  const SequenceView* send_sequences(const Batch& batch, CudaWorkspace& workspace);
  const int32_t* send_tokens(std::span<const int32_t> token_ids);

  const int32_t device_;
  DeviceProperties properties_;
  DType dtype_;
  float eps_;         // of norms of x, in the units that x has here (ModelConfig::stream_norm_eps)
  float branch_eps_;  // of all other norms
  int32_t n_heads_, n_kv_heads_, head_dim_, rope_dims_;
  std::shared_ptr<MemoryPool> memory_;
  Stream stream_ = nullptr;
  std::unique_ptr<CublasLt> cublaslt_;  // null where the library was not found
  std::recursive_mutex mutex_;          // issuing into the stream
  MirroredArray<int32_t> tokens_;
  std::vector<RecordedStep> steps_;
  // Commits of a thread's call whose rows have not been checked: synchronize() does.
  std::map<std::thread::id, std::vector<std::shared_ptr<PinnedFlag>>> unchecked_;
};

// What make_backend (backend/backend.h) makes for device "cuda" or "cuda:N".
std::unique_ptr<Backend> make_cuda_backend(const ModelConfig& config, DType dtype, int32_t device);

}  // namespace mustafar::cuda
