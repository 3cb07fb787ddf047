#include "runtime/weight_calibration.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "backend/cpu/isa.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/linear.h"
#include "backend/cpu/workspace.h"
#include "mustafar/error.h"
#include "runtime/model_impl.h"
#include "runtime/prompt_ids.h"

namespace mustafar {
namespace {

// Part of the mean square of inputs that is added to every input's: directions that the text did
// not show are not trusted further.
constexpr double kDamping = 0.01;

// Sums of x^T x over rows of activations, by the matrix products of prompts.
class MomentSums {
 public:
  MomentSums(int64_t n, const Kernels& kernels, const GemmKernels& gemm, ThreadPool& pool)
      : n_(n), kernels_(kernels), gemm_(gemm), pool_(pool), sums_(n * n) {}

  // x: [n_rows][n].
  void add(const float* x, int64_t n_rows) {
    columns_.resize(n_ * n_rows);
    pool_.parallel_for(n_, [&](int64_t c, int) {
      for (int64_t r = 0; r < n_rows; r++) columns_[c * n_rows + r] = x[r * n_ + c];
    });
    const Matrix matrix{columns_.data(), DType::kF32, n_, n_rows};
    const LinearLayer layer{&matrix, nullptr, sums_.data(), n_, /*add=*/true};
    const PackedInput packed(gemm_, n_, n_rows, workspace_.packed);
    pool_.parallel_for(packed.n_panels(), [&](int64_t panel, int) {
      packed.pack(panel, columns_.data() + panel * gemm_.rows * n_rows, n_rows);
    });
    prefill_linear(pool_, kernels_, gemm_, {&layer, 1}, packed, workspace_);
  }

  InputMoments moments() const { return {n_, sums_.data(), kDamping, pool_}; }

 private:
  int64_t n_;
  const Kernels& kernels_;
  const GemmKernels& gemm_;
  ThreadPool& pool_;
  std::vector<float> sums_;     // [n][n]
  std::vector<float> columns_;  // [n][rows]
  CpuWorkspace workspace_;
};

// A tensor of a layer, and the matrices that are its rows.
struct LayerTensor {
  std::string name;
  std::vector<Matrix*> parts;
};

class LayerWalk {
 public:
  LayerWalk(const Model& model, std::span<const std::vector<int32_t>> pieces,
            const RoundTensor& round, const std::function<void(int64_t, int64_t)>& between)
      : engine_(*model.impl()),
        config_(engine_.config),
        backend_(*engine_.backend),
        pool_(*backend_.host_pool()),
        kernels_(select_kernels(detect_isa())),
        gemm_(engine_.dtype == DType::kBF16 && kernels_.bf16.rows > 0 ? kernels_.bf16
                                                                      : kernels_.f32),
        table_(engine_.weights.table),
        pieces_(pieces),
        round_(round),
        between_(between),
        spec_(engine_.cache_spec(find_kv_preset("dense").config)) {
    for (const auto& piece : pieces) {
      const int64_t n = static_cast<int64_t>(piece.size());
      std::vector<float>& x = x_.emplace_back(n * config_.hidden_size);
      check_token_ids(piece, config_.vocab_size);
      backend_.embed(table_, piece, x.data());
    }
  }

  void run() {
    for (layer_ = 0; layer_ < config_.n_layers; layer_++) {
      LayerWeights& w = table_.layers[layer_];
      const LayerWeights stored = w;
      const std::string name = "model.layers." + std::to_string(layer_) + ".";
      const bool fused = config_.traits.fused_projections;
      const auto tensor = [&](const char* last, std::vector<Matrix*> parts) {
        return LayerTensor{name + last + ".weight", std::move(parts)};
      };
      std::vector<LayerTensor> qkv, gate_up;
      if (fused) {
        qkv = {tensor("self_attn.qkv_proj", {&w.q, &w.k, &w.v})};
        gate_up = {tensor("mlp.gate_up_proj", {&w.gate, &w.up})};
      } else {
        qkv = {tensor("self_attn.q_proj", {&w.q}), tensor("self_attn.k_proj", {&w.k}),
               tensor("self_attn.v_proj", {&w.v})};
        gate_up = {tensor("mlp.gate_proj", {&w.gate}), tensor("mlp.up_proj", {&w.up})};
      }
      pass(Half::kAttention, qkv, {tensor("self_attn.o_proj", {&w.o})});
      pass(Half::kMlp, gate_up, {tensor("mlp.down_proj", {&w.down})});
      release(stored);
      w = stored;
      rounded_.clear();
    }
  }

 private:
  enum class Half { kAttention, kMlp };

  // Runs half a layer for what its matrices read, rounds them, and runs it again for good.
  void pass(Half half, const std::vector<LayerTensor>& first,
            const std::vector<LayerTensor>& second) {
    const Matrix* const inputs[] = {first[0].parts[0], second[0].parts[0]};
    std::vector<std::unique_ptr<MomentSums>> sums;
    for (const Matrix* matrix : inputs) {
      sums.push_back(std::make_unique<MomentSums>(matrix->cols, kernels_, gemm_, pool_));
    }
    CpuWorkspace& workspace = static_cast<CpuWorkspace&>(*workspace_);
    workspace.observe_input = [&](const Matrix& matrix, const float* x, int64_t n_rows) {
      for (int i = 0; i < 2; i++) {
        if (&matrix == inputs[i]) sums[i]->add(x, n_rows);
      }
    };
    run_half(half, /*keep=*/false);
    workspace.observe_input = nullptr;
    for (int i = 0; i < 2; i++) {
      const InputMoments moments = sums[i]->moments();
      sums[i].reset();
      for (const LayerTensor& tensor : i == 0 ? first : second) {
        if (const auto codes = round_(tensor.name, moments)) use(*codes, tensor.parts);
        tick();
      }
    }
    run_half(half, /*keep=*/true);
  }

  // Makes the graph read what codes stand for.
  void use(const GroupCodes& codes, const std::vector<Matrix*>& parts) {
    std::vector<float>& weights = rounded_.emplace_back(codes.rows * codes.cols);
    pool_.parallel_for(codes.rows, [&](int64_t r, int) {
      for (int64_t c = 0; c < codes.cols; c++) weights[r * codes.cols + c] = codes.weight(r, c);
    });
    const float* row = weights.data();
    for (Matrix* part : parts) {
      *part = Matrix{row, DType::kF32, part->rows, part->cols};
      row += part->rows * part->cols;
    }
  }

  // keep: activations change; else only what is observed counts.
  void run_half(Half half, bool keep) {
    for (size_t i = 0; i < pieces_.size(); i++) {
      std::vector<float>& x = x_[i];
      float* to = x.data();
      if (!keep) {
        copy_ = x;
        to = copy_.data();
      }
      half == Half::kAttention ? run_attention(pieces_[i], to) : run_mlp(pieces_[i], to);
      tick();
    }
  }

  void run_attention(const std::vector<int32_t>& piece, float* x) {
    const int64_t n = static_cast<int64_t>(piece.size()), hidden = config_.hidden_size;
    const int64_t width = int64_t{config_.n_heads} * config_.head_dim;
    SequenceCache cache = engine_.new_cache(spec_, n);  // stays empty: one layer's rows are fresh
    const PendingAppend pending = cache.prepare(1, /*in_place=*/false);
    const KVMemory fresh = cache.fresh(n);
    SequenceStep step = cache.view(pending);
    step.fresh = static_cast<uint8_t*>(fresh.data());
    step.fresh_capacity = static_cast<int32_t>(n);
    step.fresh_pos0 = 0;
    for (int64_t row = 0; row < n; row += backend_.prefill_rows()) {
      const int64_t rows = std::min(backend_.prefill_rows(), n - row);
      step.row0 = 0;
      step.n_rows = static_cast<int32_t>(rows);
      step.pos0 = static_cast<int32_t>(row);
      const Batch batch{{&step, 1}, static_cast<int32_t>(rows), /*decode=*/false};
      q_.resize(rows * width);
      attention_.resize(rows * width);
      backend_.project_qkv(table_, layer_, batch, x + row * hidden, q_.data(), *workspace_);
      backend_.attend(layer_, batch, q_.data(), attention_.data(), *workspace_);
      backend_.project_output(table_, layer_, batch, attention_.data(), x + row * hidden,
                              *workspace_);
    }
  }

  void run_mlp(const std::vector<int32_t>& piece, float* x) {
    const int64_t n = static_cast<int64_t>(piece.size());
    for (int64_t row = 0; row < n; row += backend_.prefill_rows()) {
      const int64_t rows = std::min(backend_.prefill_rows(), n - row);
      const Batch batch{{}, static_cast<int32_t>(rows), /*decode=*/false};
      backend_.mlp(table_, layer_, batch, x + row * config_.hidden_size, *workspace_);
    }
  }

  // The layer's pages of the file need not stay in memory.
  void release(const LayerWeights& stored) const {
    for (const Matrix* m :
         {&stored.q, &stored.k, &stored.v, &stored.o, &stored.gate, &stored.up, &stored.down}) {
      engine_.source->release(m->data, dtype_bytes(m->dtype, m->rows * m->cols));
    }
  }

  void tick() {
    const int64_t tensors = config_.traits.fused_projections ? 4 : 7;
    const int64_t passes = 4 * static_cast<int64_t>(pieces_.size());
    if (between_) between_(++done_, config_.n_layers * (passes + tensors));
  }

  Model::Impl& engine_;
  const ModelConfig& config_;
  Backend& backend_;
  ThreadPool& pool_;
  const Kernels kernels_;
  const GemmKernels& gemm_;
  Weights table_;  // the model's, the layer at hand with rounded matrices
  std::span<const std::vector<int32_t>> pieces_;
  const RoundTensor& round_;
  const std::function<void(int64_t, int64_t)>& between_;
  const std::shared_ptr<const CacheSpec> spec_;
  const std::unique_ptr<Workspace> workspace_ = backend_.make_workspace();
  std::vector<std::vector<float>> x_;        // [pieces][tokens][hidden]
  std::vector<std::vector<float>> rounded_;  // [tensors of the layer][rows][cols]
  std::vector<float> copy_, q_, attention_;
  int32_t layer_ = 0;
  int64_t done_ = 0;
};

}  // namespace

void calibrate_layers(const Model& model, std::span<const std::vector<int32_t>> pieces,
                      const RoundTensor& round,
                      const std::function<void(int64_t, int64_t)>& between) {
  LayerWalk(model, pieces, round, between).run();
}

}  // namespace mustafar
