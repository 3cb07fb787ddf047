#include "backend/cpu/cpu_backend.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <new>

#include "backend/cpu/attention/decode.h"
#include "backend/cpu/attention/prefill.h"
#include "backend/cpu/compress/commit.h"
#include "backend/cpu/compress/expand.h"
#include "backend/cpu/linear/linear.h"
#include "backend/cpu/linear/row_scores.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

class CpuMemory final : public DeviceMemory {
 public:
  explicit CpuMemory(int64_t bytes) : buffer_(static_cast<size_t>(bytes)) {
    data_ = buffer_.data();
    bytes_ = bytes;
  }

 private:
  HostBuffer buffer_;
};

CpuWorkspace& on_cpu(Workspace& workspace) { return static_cast<CpuWorkspace&>(workspace); }

// Rows of a prompt that pass the MLP together: their inner activations, the widest there are, take
// tens of megabytes whatever the prompt's length, and weights are read seldom enough.
constexpr int64_t kMlpRows = 2048;

// Deals the dims of n vectors [n][head_dim] to groups (block_format.h), in place, or takes them
// back. scratch: [head_dim].
enum class Deal { kOut, kBack };
void deal(Deal direction, float* x, int64_t n, int32_t n_groups, int32_t head_dim, float* scratch) {
  const int32_t members = head_dim / n_groups;
  for (; n > 0; n--, x += head_dim) {
    for (int32_t g = 0; g < n_groups; g++) {
      for (int32_t i = 0; i < members; i++) {
        const int32_t stored = g * members + i, dim = i * n_groups + g;
        direction == Deal::kOut ? scratch[stored] = x[dim] : scratch[dim] = x[stored];
      }
    }
    std::copy_n(scratch, head_dim, x);
  }
}

// out [cols] = a row of a quantised matrix.
void dequantise_row(const Matrix& w, int64_t row, float* out) {
  const QuantisedShape shape = w.shape();
  const uint8_t* codes = static_cast<const uint8_t*>(w.data);
  for (int64_t c = 0; c < w.cols; c++) {
    out[c] = w.weight(code_at(shape, codes, row, c), scale_at(shape, row, c));
  }
}

}  // namespace

CpuBackend::CpuBackend(const ModelConfig& config, DType dtype, int32_t threads, Isa isa)
    : kernels_(select_kernels(isa)),
      gemm_(dtype == DType::kBF16 && kernels_.bf16.rows > 0 ? kernels_.bf16 : kernels_.f32),
      int8_input_(dtype != DType::kF32),
      isa_(isa),
      dtype_(dtype),
      eps_(static_cast<float>(config.stream_norm_eps())),
      branch_eps_(static_cast<float>(config.rms_norm_eps)),
      n_heads_(config.n_heads),
      n_kv_heads_(config.n_kv_heads),
      head_dim_(config.head_dim),
      rope_dims_(config.rope_dims()),
      pool_(threads) {}

std::string CpuBackend::description() const {
  return std::string(isa_description(isa_)) + ", " + std::to_string(pool_.size()) +
         (pool_.size() == 1 ? " thread" : " threads");
}

std::unique_ptr<DeviceMemory> CpuBackend::allocate(int64_t bytes) {
  try {
    return std::make_unique<CpuMemory>(bytes);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("CPU: can't allocate " + std::to_string(bytes) + " bytes, about " +
                      std::to_string(available_bytes()) + " are available");
  }
}

void CpuBackend::upload(void* device, const void* host, int64_t bytes) {
  std::memcpy(device, host, static_cast<size_t>(bytes));
}

void CpuBackend::download(void* host, const void* device, int64_t bytes) {
  std::memcpy(host, device, static_cast<size_t>(bytes));
}

void CpuBackend::copy(void* to, const void* from, int64_t bytes) {
  std::memmove(to, from, static_cast<size_t>(bytes));
}

int64_t CpuBackend::available_bytes() const {
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  int64_t kib = 0;
  while (meminfo >> key >> kib) {
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") return kib * 1024;
  }
  return int64_t{sysconf(_SC_AVPHYS_PAGES)} * sysconf(_SC_PAGESIZE);
}

std::unique_ptr<Workspace> CpuBackend::make_workspace() { return std::make_unique<CpuWorkspace>(); }

void CpuBackend::embed(const Weights& weights, std::span<const int32_t> token_ids, float* out) {
  const Matrix& table = weights.embedding;
  for (size_t i = 0; i < token_ids.size(); i++) {
    float* row = out + static_cast<int64_t>(i) * table.cols;
    if (table.quantised()) {
      dequantise_row(table, token_ids[i], row);
    } else {
      const int64_t at = dtype_bytes(table.dtype, int64_t{token_ids[i]} * table.cols);
      kernels_.to_f32(static_cast<const uint8_t*>(table.data) + at, table.dtype, table.cols, row);
    }
    if (weights.embedding_scale != 1) {
      kernels_.scale(row, weights.embedding_scale, table.cols, row);
    }
  }
}

const float* CpuBackend::norm_rows(const float* x, const float* weight, int64_t n, int64_t hidden,
                                   CpuWorkspace& workspace) {
  float* out = grow<float>(workspace.normed, n * hidden);
  pool_.parallel_rows(n, hidden, [&](int64_t i, int) {
    kernels_.rms_norm(x + i * hidden, weight, eps_, hidden, out + i * hidden);
  });
  return out;
}

bool CpuBackend::takes_rows(const Batch& batch,
                            std::initializer_list<const Matrix*> matrices) const {
  if (batch.decode) return true;
  return int8_input_ && kernels_.rounds_prompts &&
         std::all_of(matrices.begin(), matrices.end(),
                     [](const Matrix* w) { return w->quantised() && w->dtype == DType::kInt4; });
}

PackedInput CpuBackend::pack(const float* x, int64_t n, int64_t cols, CpuWorkspace& workspace) {
  const PackedInput packed(gemm_, n, cols, workspace.packed);
  pool_.parallel_rows(packed.n_panels(), cols * gemm_.rows, [&](int64_t panel, int) {
    packed.pack(panel, x + panel * gemm_.rows * cols, cols);
  });
  return packed;
}

void CpuBackend::prepare_rope(const Weights& weights, const Batch& batch, CpuWorkspace& workspace) {
  std::vector<CpuWorkspace::RopeRow> rows(batch.n_rows);
  for (const SequenceStep& step : batch.sequences) {
    const bool is_long = step.long_rope && weights.long_rope_frequencies != nullptr;
    for (int32_t i = 0; i < step.n_rows; i++) {
      rows[step.row0 + i] = {step.pos0 + i,
                             is_long ? weights.long_rope_frequencies : weights.rope_frequencies};
    }
  }
  if (rows == workspace.rope_rows) return;
  const int64_t half = rope_dims_ / 2;
  workspace.rope_rows.clear();
  float* cos = grow<float>(workspace.rope, 2 * batch.n_rows * half);
  float* sin = cos + batch.n_rows * half;
  pool_.parallel_rows(batch.n_rows, 32 * half, [&](int64_t row, int) {
    for (int64_t i = 0; i < half; i++) {
      const float angle = static_cast<float>(rows[row].position) * rows[row].frequencies[i];
      cos[row * half + i] = std::cos(angle) * weights.rope_scale;
      sin[row * half + i] = std::sin(angle) * weights.rope_scale;
    }
  });
  workspace.rope_rows = std::move(rows);
}

void CpuBackend::store_row(int32_t layer, const SequenceStep& step, int32_t row, int32_t kind,
                           const float* x) const {
  const int64_t row_bytes = dtype_bytes(dtype_, head_dim_);
  for (int32_t head = 0; head < n_kv_heads_; head++) {
    kernels_.from_f32(x + int64_t{head} * head_dim_, head_dim_, dtype_,
                      new_row(step, layer, kind, n_kv_heads_, head, step.pos0 + row, row_bytes));
  }
}

void CpuBackend::norm_heads(QkNorm kind, const float* weight, int32_t n_heads, float* x) const {
  if (kind == QkNorm::kNone) return;
  const int64_t width = kind == QkNorm::kHead ? head_dim_ : int64_t{n_heads} * head_dim_;
  for (float* end = x + int64_t{n_heads} * head_dim_; x < end; x += width) {
    kernels_.rms_norm(x, weight, branch_eps_, width, x);
  }
}

void CpuBackend::finish_row(const Weights& weights, int32_t layer, const SequenceStep& step,
                            int32_t row, const float* cos, const float* sin, float* q, float* k,
                            float* v, float* scratch) const {
  const int64_t d = head_dim_;
  const LayerWeights& w = weights.layers[layer];
  norm_heads(weights.qk_norm, w.q_norm, n_heads_, q);
  norm_heads(weights.qk_norm, w.k_norm, n_kv_heads_, k);
  if (w.rotates) {
    for (int64_t head = 0; head < n_heads_; head++) {
      kernels_.rope(q + head * d, cos, sin, rope_dims_);
    }
    for (int64_t head = 0; head < n_kv_heads_; head++) {
      kernels_.rope(k + head * d, cos, sin, rope_dims_);
    }
  }
  if (weights.query_scale != 1) kernels_.scale(q, weights.query_scale, n_heads_ * d, q);
  const KVTransform& transform = step.transform;
  const int64_t group = n_heads_ / n_kv_heads_;
  if (transform.k_forward == nullptr && transform.k_groups > 1) {
    deal(Deal::kOut, q, n_heads_, transform.k_groups, head_dim_, scratch);
    deal(Deal::kOut, k, n_kv_heads_, transform.k_groups, head_dim_, scratch);
  }
  if (transform.v_forward == nullptr && transform.v_groups > 1) {
    deal(Deal::kOut, v, n_kv_heads_, transform.v_groups, head_dim_, scratch);
  }
  for (int32_t head = 0; head < n_kv_heads_; head++) {
    const int64_t matrix = head_index(layer, n_kv_heads_, head) * d * d;
    if (transform.k_forward != nullptr) {
      kernels_.multiply_row(k + head * d, transform.k_forward + matrix, head_dim_, scratch);
      std::copy_n(scratch, d, k + head * d);
      // q' = q B^T: a product with B as stored.
      GemvArgs args;
      args.weights = transform.k_backward + matrix;
      args.cols = d;
      args.row1 = d;
      args.x = q + head * group * d;
      args.x_stride = d;
      args.batch = static_cast<int32_t>(group);
      args.y = scratch;
      args.y_stride = d;
      kernels_.gemv(args);
      std::copy_n(scratch, group * d, q + head * group * d);
    }
    if (transform.v_forward != nullptr) {
      kernels_.multiply_row(v + head * d, transform.v_forward + matrix, head_dim_, scratch);
      std::copy_n(scratch, d, v + head * d);
    }
  }
  store_row(layer, step, row, kKeys, k);
  store_row(layer, step, row, kValues, v);
}

void CpuBackend::project_qkv(const Weights& weights, int32_t layer, const Batch& batch,
                             const float* x, float* q, Workspace& workspace) {
  CpuWorkspace& ws = on_cpu(workspace);
  const LayerWeights& w = weights.layers[layer];
  const int64_t n = batch.n_rows, hidden = w.q.cols;
  const int64_t q_dim = w.q.rows, kv_dim = w.k.rows;
  float* k = grow<float>(ws.keys, n * kv_dim);
  float* v = grow<float>(ws.values, n * kv_dim);
  const LinearLayer layers[] = {{&w.q, w.q_bias, q, q_dim, false},
                                {&w.k, w.k_bias, k, kv_dim, false},
                                {&w.v, w.v_bias, v, kv_dim, false}};
  const float* normed = w.attention_norm ? norm_rows(x, w.attention_norm, n, hidden, ws) : x;
  if (!batch.decode && ws.observe_input) ws.observe_input(w.q, normed, n);
  if (takes_rows(batch, {&w.q, &w.k, &w.v})) {
    decode_linear(pool_, kernels_, layers, normed, hidden, batch.n_rows, int8_input_, ws);
  } else {
    prefill_linear(pool_, kernels_, gemm_, layers, pack(normed, n, hidden, ws), ws);
  }

  prepare_rope(weights, batch, ws);
  const int64_t half = rope_dims_ / 2;
  const float* cos = ws.rope.as<float>();
  const float* sin = cos + n * half;
  ws.workers.resize(pool_.size());
  for (HostBuffer& buffer : ws.workers) grow<float>(buffer, q_dim);
  for (const SequenceStep& step : batch.sequences) {
    pool_.parallel_rows(step.n_rows, (step.transform.is_identity() ? 1 : head_dim_) * q_dim,
                        [&](int64_t i, int worker) {
                          const int64_t row = step.row0 + i;
                          finish_row(weights, layer, step, static_cast<int32_t>(i),
                                     cos + row * half, sin + row * half, q + row * q_dim,
                                     k + row * kv_dim, v + row * kv_dim,
                                     ws.workers[worker].as<float>());
                        });
    record_query_magnitude(step, layer, n_heads_, n_kv_heads_, head_dim_, q + step.row0 * q_dim);
  }
}

void CpuBackend::attend(int32_t layer, const Batch& batch, const float* q, float* out,
                        Workspace& workspace) {
  CpuWorkspace& ws = on_cpu(workspace);
  if (batch.decode) {
    DecodeAttentionArgs args;
    args.layer = layer;
    args.n_heads = n_heads_;
    args.n_kv_heads = n_kv_heads_;
    args.head_dim = head_dim_;
    args.tail_dtype = dtype_;
    args.sequences = batch.sequences;
    args.q = q;
    args.out = out;
    decode_attention(pool_, isa_, args, ws.attention);
  } else {
    PrefillAttentionArgs args;
    args.layer = layer;
    args.n_heads = n_heads_;
    args.n_kv_heads = n_kv_heads_;
    args.head_dim = head_dim_;
    args.tail_dtype = dtype_;
    args.sequences = batch.sequences;
    args.q = q;
    args.out = out;
    prefill_attention(pool_, kernels_, gemm_, args, ws);
  }

  const int64_t d = head_dim_, q_dim = n_heads_ * d, group = n_heads_ / n_kv_heads_;
  ws.workers.resize(pool_.size());
  for (HostBuffer& buffer : ws.workers) grow<float>(buffer, d);
  for (const SequenceStep& step : batch.sequences) {
    const float* back = step.transform.v_backward;
    const int32_t groups = step.transform.v_groups;
    if (back == nullptr && groups == 1) continue;
    if (back != nullptr) back += head_index(layer, n_kv_heads_, 0) * d * d;
    pool_.parallel_rows(step.n_rows, q_dim * (back != nullptr ? d : 1), [&](int64_t i, int worker) {
      float* row = out + (step.row0 + i) * q_dim;
      float* scratch = ws.workers[worker].as<float>();
      if (back == nullptr) {
        deal(Deal::kBack, row, n_heads_, groups, head_dim_, scratch);
        return;
      }
      for (int64_t head = 0; head < n_heads_; head++) {
        kernels_.multiply_row(row + head * d, back + head / group * d * d, head_dim_, scratch);
        std::copy_n(scratch, d, row + head * d);
      }
    });
  }
}

void CpuBackend::add_normed(float* branch, const float* weight, int64_t n, int64_t hidden,
                            float* x) {
  pool_.parallel_rows(n, hidden, [&](int64_t i, int) {
    float* row = branch + i * hidden;
    kernels_.rms_norm(row, weight, branch_eps_, hidden, row);
    for (int64_t j = 0; j < hidden; j++) x[i * hidden + j] += row[j];
  });
}

void CpuBackend::project_output(const Weights& weights, int32_t layer, const Batch& batch,
                                const float* attention, float* x, Workspace& workspace) {
  CpuWorkspace& ws = on_cpu(workspace);
  const LayerWeights& w = weights.layers[layer];
  const int64_t n = batch.n_rows, hidden = w.o.rows;
  const bool adds = w.attention_out_norm == nullptr;
  float* out = adds ? x : grow<float>(ws.branch, n * hidden);
  const LinearLayer layers[] = {{&w.o, w.o_bias, out, hidden, adds}};
  if (!batch.decode && ws.observe_input) ws.observe_input(w.o, attention, n);
  if (takes_rows(batch, {&w.o})) {
    decode_linear(pool_, kernels_, layers, attention, w.o.cols, batch.n_rows, int8_input_, ws);
  } else {
    prefill_linear(pool_, kernels_, gemm_, layers, pack(attention, n, w.o.cols, ws), ws);
  }
  if (!adds) add_normed(out, w.attention_out_norm, n, hidden, x);
}

void CpuBackend::mlp(const Weights& weights, int32_t layer, const Batch& batch, float* x,
                     Workspace& workspace) {
  CpuWorkspace& ws = on_cpu(workspace);
  const LayerWeights& w = weights.layers[layer];
  const int64_t n = batch.n_rows, hidden = w.gate.cols, inner = w.gate.rows;
  const bool adds = w.mlp_out_norm == nullptr;
  const bool by_rows = takes_rows(batch, {&w.gate, &w.up, &w.down});
  const int64_t together = by_rows ? kRowsAtOnce : kMlpRows;
  for (int64_t row = 0; row < n; row += together) {
    const int64_t rows = std::min(together, n - row);
    float* some = x + row * hidden;
    const float* normed = w.mlp_norm ? norm_rows(some, w.mlp_norm, rows, hidden, ws) : some;
    float* gated = grow<float>(ws.gated, rows * inner);
    float* out = adds ? some : grow<float>(ws.branch, rows * hidden);
    const LinearLayer down[] = {{&w.down, w.down_bias, out, hidden, adds}};
    const bool observes = !batch.decode && ws.observe_input;
    if (observes) ws.observe_input(w.gate, normed, rows);
    if (by_rows) {
      decode_gate_up(pool_, kernels_, w, normed, static_cast<int32_t>(rows), gated, int8_input_,
                     ws);
    } else {
      prefill_gate_up(pool_, kernels_, gemm_, w, pack(normed, rows, hidden, ws), gated, ws);
    }
    if (observes) ws.observe_input(w.down, gated, rows);
    if (by_rows) {
      decode_linear(pool_, kernels_, down, gated, inner, static_cast<int32_t>(rows), int8_input_,
                    ws);
    } else {
      prefill_linear(pool_, kernels_, gemm_, down, pack(gated, rows, inner, ws), ws);
    }
    if (!adds) add_normed(out, w.mlp_out_norm, rows, hidden, some);
  }
}

void CpuBackend::logits(const Weights& weights, const Batch& batch, std::span<const int32_t> rows,
                        const float* x, float* logits, Workspace& workspace) {
  CpuWorkspace& ws = on_cpu(workspace);
  const Matrix& head = weights.lm_head;
  const int64_t n = static_cast<int64_t>(rows.size()), hidden = head.cols;
  float* normed = grow<float>(ws.normed, n * hidden);
  pool_.parallel_rows(n, hidden, [&](int64_t i, int) {
    kernels_.rms_norm(x + rows[i] * hidden, weights.final_norm, eps_, hidden, normed + i * hidden);
  });
  const LinearLayer layers[] = {{&head, nullptr, logits, head.rows, false}};
  // At most one row a sequence, which is what generation asks for, takes one path whatever the
  // batch, so that results do not depend on it; only scoring asks for more.
  if (batch.decode || rows.size() <= batch.sequences.size()) {
    decode_linear(pool_, kernels_, layers, normed, hidden, static_cast<int32_t>(n), int8_input_,
                  ws);
    return;
  }
  prefill_linear(pool_, kernels_, gemm_, layers, pack(normed, n, hidden, ws), ws);
}

void CpuBackend::score_rows(const float* logits, int64_t vocab, std::span<RowScore> rows,
                            Workspace&) {
  score_host_rows(pool_, kernels_, logits, vocab, rows);
}

void CpuBackend::commit(std::span<const CommitStep> steps, int32_t first_layer, int32_t n_layers,
                        Workspace&) {
  commit_blocks(pool_, isa_, dtype_, steps, first_layer, n_layers);
}

void CpuBackend::expand(const SequenceStep& step, int32_t block, const KVTransform& to,
                        uint8_t* out, int32_t out_capacity) {
  expand_rows(pool_, kernels_, dtype_, step, block, to, out, out_capacity);
}

}  // namespace mustafar
