#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <new>

#include "backend/device_name.h"
#include "cuda/compress.h"
#include "cuda/elementwise.h"
#include "mustafar/error.h"

namespace mustafar::cuda {
namespace {

constexpr size_t kMaxRecordedSteps = 32;  // graphs that are kept; the oldest goes first
// Of a device's memory, one part in so many may wait for its next use; on the harness, whose fresh
// memory is NaN and whose freed memory can't be read, nothing.
#if defined(MUSTAFAR_SIMT)
constexpr int64_t kKeptShare = int64_t{1} << 62;
#else
constexpr int64_t kKeptShare = 64;
#endif

class CudaMemory final : public DeviceMemory {
 public:
  CudaMemory(std::shared_ptr<MemoryPool> pool, int64_t bytes) : pool_(std::move(pool)) {
    data_ = pool_->take(bytes);
    bytes_ = bytes;
  }
  ~CudaMemory() override { pool_->give(data_, bytes_); }

 private:
  const std::shared_ptr<MemoryPool> pool_;
};

CudaWorkspace& on_cuda(Workspace& workspace) { return static_cast<CudaWorkspace&>(workspace); }

// Splits of the longest sequence, rounded up so that a recorded step stays good as contexts grow.
int32_t split_bound(std::span<const SequenceStep> sequences) {
  int32_t most = 1;
  for (const SequenceStep& s : sequences) {
    most = std::max(most, seen_tokens(s, 0).n_splits());
  }
  int32_t bound = 1;
  while (bound < most) bound *= 2;
  return bound;
}

// The same of a layer, whose window may bound them, whatever the lengths.
int32_t split_bound(std::span<const SequenceStep> sequences, int32_t window) {
  const int32_t bound = split_bound(sequences);
  return window > 0 ? std::min(bound, most_window_splits(window)) : bound;
}

// x rounded up to three leading bits.
int32_t rounded_up(int32_t x) {
  int32_t unit = 1;
  while (x > 8 * unit) unit *= 2;
  return (x + unit - 1) / unit * unit;
}

// What a decode step has to do for sequences that share launches, rounded up for the same reason.
DecodeLoad decode_load(std::span<const SequenceStep> sequences) {
  int32_t n_splits = 0, split_tiles = kMinSplitTiles;
  for (const SequenceStep& s : sequences) {
    const SeenTokens seen = seen_tokens(s, 0);
    const int32_t splits = seen.n_splits();
    n_splits += splits;
    split_tiles = std::max(split_tiles, (seen.n_tiles() + splits - 1) / splits);
  }
  return {rounded_up(n_splits), rounded_up(split_tiles)};
}

// The same of a layer, likewise.
DecodeLoad decode_load(std::span<const SequenceStep> sequences, int32_t window) {
  DecodeLoad load = decode_load(sequences);
  if (window > 0) {
    const int32_t tiles = most_window_tiles(window), splits = most_window_splits(window);
    load.n_splits = std::min(load.n_splits, static_cast<int32_t>(sequences.size()) * splits);
    load.split_tiles = std::min(load.split_tiles, (tiles + splits - 1) / splits);
  }
  return load;
}

// Most rows of a sequence whose |q| is recorded for pruning.
int32_t newest_magnitudes(const Batch& batch) {
  int32_t newest = 0;
  for (const SequenceStep& s : batch.sequences) {
    if (s.query_magnitude != nullptr) newest = std::max(newest, std::min(s.n_rows, s.query_window));
  }
  return newest;
}

// Calls body(first, count) for runs of neighbours with one layout. Item: what layout_of takes.
template <typename Item, typename LayoutOf, typename Body>
void for_layouts(std::span<const Item> items, LayoutOf&& layout_of, Body&& body) {
  for (size_t first = 0; first < items.size();) {
    size_t end = first + 1;
    while (end < items.size() && layout_of(items[end]) == layout_of(items[first])) end++;
    body(static_cast<int32_t>(first), static_cast<int32_t>(end - first));
    first = end;
  }
}

LinearArgs product_of(std::initializer_list<LinearPart> parts, int64_t cols, const float* x,
                      int32_t n) {
  LinearArgs args;
  for (const LinearPart& part : parts) args.parts[args.n_parts++] = part;
  args.cols = cols;
  args.x = x;
  args.n = n;
  return args;
}

}  // namespace

CudaBackend::CudaBackend(const ModelConfig& config, DType dtype, int32_t device)
    : device_(device),
      properties_(open_device(device)),
      dtype_(dtype),
      eps_(static_cast<float>(config.stream_norm_eps())),
      branch_eps_(static_cast<float>(config.rms_norm_eps)),
      n_heads_(config.n_heads),
      n_kv_heads_(config.n_kv_heads),
      head_dim_(config.head_dim),
      rope_dims_(config.rope_dims()),
      memory_(std::make_shared<MemoryPool>(properties_.memory_bytes / kKeptShare, device)) {
  if (head_dim_ > kMaxHeadDim) {
    throw DeviceError("device \"" + this->device() + "\" takes a head_dim up to " +
                      std::to_string(kMaxHeadDim) + ", this model has " +
                      std::to_string(head_dim_));
  }
  const DeviceScope scope(device_);
  cublaslt_ = CublasLt::open();
  stream_ = make_stream();
}

CudaBackend::~CudaBackend() {
  const DeviceScope scope(device_, std::nothrow);
  for (const RecordedStep& step : steps_) destroy_graph(step.graph);
  destroy_stream(stream_);
}

std::string CudaBackend::device() const {
  return DeviceName{DeviceName::Kind::kCuda, device_}.text();
}

std::string CudaBackend::description() const {
  return properties_.name + " (sm_" + std::to_string(properties_.compute_capability) + "), " +
         (cublaslt_ != nullptr ? "cuBLASLt " + cublaslt_->version() : "own GEMM");
}

std::unique_ptr<DeviceMemory> CudaBackend::allocate(int64_t bytes) {
  return std::make_unique<CudaMemory>(memory_, bytes);
}

void CudaBackend::upload(void* device, const void* host, int64_t bytes) {
  const Turn turn(*this);
  copy_to_device(device, host, bytes, stream_);
  cuda::synchronize(stream_);
}

void CudaBackend::download(void* host, const void* device, int64_t bytes) {
  const Turn turn(*this);
  copy_to_host(host, device, bytes, stream_);
  cuda::synchronize(stream_);
}

void CudaBackend::copy(void* to, const void* from, int64_t bytes) {
  const Turn turn(*this);
  copy_on_device(to, from, bytes, stream_);
}

int64_t CudaBackend::available_bytes() const {
  const DeviceScope scope(device_);
  return device_available_bytes() + memory_->kept();
}

std::unique_ptr<Workspace> CudaBackend::make_workspace() {
  const DeviceScope scope(device_);
  return std::make_unique<CudaWorkspace>();
}

const int32_t* CudaBackend::send_tokens(std::span<const int32_t> token_ids) {
  return tokens_.send(token_ids, stream_);
}

const SequenceView* CudaBackend::send_sequences(const Batch& batch, CudaWorkspace& workspace) {
  const std::vector<SequenceView> views(batch.sequences.begin(), batch.sequences.end());
  return workspace.sequences.send(views, stream_);
}

void CudaBackend::embed(const Weights& weights, std::span<const int32_t> token_ids, float* out) {
  const Turn turn(*this);
  unchecked_.erase(std::this_thread::get_id());  // of a call that was dropped
  const Matrix& table = weights.embedding;
  const int32_t* ids = send_tokens(token_ids);
  const int32_t n = static_cast<int32_t>(token_ids.size());
  if (table.quantised()) {
    embed_codes(part_of(table, nullptr, nullptr), ids, n, table.cols, out, stream_);
  } else {
    cuda::embed(table.data, table.dtype, ids, n, table.cols, out, stream_);
  }
  if (weights.embedding_scale != 1) scale(out, weights.embedding_scale, n * table.cols, stream_);
}

void CudaBackend::project_qkv(const Weights& weights, int32_t layer, const Batch& batch,
                              const float* x, float* q, Workspace& workspace) {
  const Turn turn(*this);
  CudaWorkspace& ws = on_cuda(workspace);
  const LayerWeights& w = weights.layers[layer];
  const int32_t n = batch.n_rows;
  float* k = ws.keys.ensure<float>(n * w.k.rows);
  float* v = ws.values.ensure<float>(n * w.v.rows);
  LinearArgs products =
      product_of({part_of(w.q, w.q_bias, q), part_of(w.k, w.k_bias, k), part_of(w.v, w.v_bias, v)},
                 w.q.cols, x, n);
  products.norm = w.attention_norm;
  products.eps = eps_;
  linear(products, batch.decode, ws);
  norm_heads(weights.qk_norm, w.q_norm, n_heads_, n, q);
  norm_heads(weights.qk_norm, w.k_norm, n_kv_heads_, n, k);

  RopeArgs rope;
  rope.sequences = send_sequences(batch, ws);
  rope.n_sequences = static_cast<int32_t>(batch.sequences.size());
  rope.n_rows = n;
  rope.layer = layer;
  rope.n_heads = n_heads_;
  rope.n_kv_heads = n_kv_heads_;
  rope.head_dim = head_dim_;
  rope.tail_dtype = dtype_;
  rope.rotates = w.rotates;
  rope.rope_dims = rope_dims_;
  rope.rope_scale = weights.rope_scale;
  rope.query_scale = weights.query_scale;
  rope.frequencies = weights.rope_frequencies;
  rope.long_frequencies = weights.long_rope_frequencies;
  rope.q = q;
  rope.k = k;
  rope.v = v;
  rope_append(rope, stream_);

  const int32_t newest = newest_magnitudes(batch);
  if (newest == 0) return;
  AttentionArgs magnitude;
  magnitude.sequences = rope.sequences;
  magnitude.n_sequences = rope.n_sequences;
  magnitude.max_row_count = newest;
  magnitude.layer = layer;
  magnitude.n_heads = n_heads_;
  magnitude.n_kv_heads = n_kv_heads_;
  magnitude.head_dim = head_dim_;
  magnitude.q = q;
  record_query_magnitude(magnitude, stream_);
}

void CudaBackend::attend(int32_t layer, const Batch& batch, const float* q, float* out,
                         Workspace& workspace) {
  const Turn turn(*this);
  CudaWorkspace& ws = on_cuda(workspace);
  const SequenceView* views = send_sequences(batch, ws);
  AttentionArgs args;
  args.n_rows = batch.n_rows;
  args.tail_dtype = dtype_;
  args.layer = layer;
  args.window = batch.sequences[0].window(layer);
  args.n_heads = n_heads_;
  args.n_kv_heads = n_kv_heads_;
  args.head_dim = head_dim_;
  args.q = q;
  args.out = out;
  args.decode = batch.decode;
  args.max_splits = batch.decode ? split_bound(batch.sequences, args.window) : 1;
  args.partials = ws.partials.ensure<float>(int64_t{batch.n_rows} * n_heads_ * args.max_splits *
                                            (head_dim_ + 2));
  for_layouts(
      batch.sequences, [](const SequenceStep& s) -> const StoreLayout& { return *s.layout; },
      [&](int32_t first, int32_t count) {
        args.sequences = views + first;
        args.n_sequences = count;
        args.layout = *batch.sequences[first].layout;
        args.max_row_count = 1;
        args.writes_out = !args.decode;
        if (args.decode) {
          args.load = decode_load(batch.sequences.subspan(first, count), args.window);
        }
        bool undo = false;
        for (int32_t i = first; i < first + count; i++) {
          args.max_row_count = std::max(args.max_row_count, batch.sequences[i].n_rows);
          undo = undo || batch.sequences[i].transform.v_backward != nullptr;
        }
        if (!args.decode && prefill_attention_fast(args, stream_)) {
          if (undo) undo_value_transform(args, stream_);
          return;
        }
        const bool fast = args.decode && decode_attention_fast(args, stream_);
        if (!fast) attention_plain(args, stream_);
        args.undoes_values = !(fast && undo && args.n_rows > kFewRows && undoes_values(head_dim_));
        combine_attention(args, stream_);
        if (!args.undoes_values) undo_value_transform(args, stream_);
      });
}

void CudaBackend::project_output(const Weights& weights, int32_t layer, const Batch& batch,
                                 const float* attention, float* x, Workspace& workspace) {
  const Turn turn(*this);
  const LayerWeights& w = weights.layers[layer];
  add_branch(
      product_of({part_of(w.o, w.o_bias, x, /*add=*/true)}, w.o.cols, attention, batch.n_rows),
      w.attention_out_norm, w.o.rows, batch.decode, on_cuda(workspace));
}

void CudaBackend::mlp(const Weights& weights, int32_t layer, const Batch& batch, float* x,
                      Workspace& workspace) {
  const Turn turn(*this);
  CudaWorkspace& ws = on_cuda(workspace);
  const LayerWeights& w = weights.layers[layer];
  const int32_t n = batch.n_rows;
  float* gate = ws.gate.ensure<float>(n * w.gate.rows);
  float* up = ws.up.ensure<float>(n * w.up.rows);
  LinearArgs products = product_of(
      {part_of(w.gate, w.gate_bias, gate), part_of(w.up, w.up_bias, up)}, w.gate.cols, x, n);
  products.norm = w.mlp_norm;
  products.eps = eps_;
  LinearArgs down =
      product_of({part_of(w.down, w.down_bias, x, /*add=*/true)}, w.down.cols, gate, n);
  // Where both are products on 2-byte operands, the second's is written as such.
  products.gated = !(by_multiply(products, batch.decode) && by_multiply(down, batch.decode));
  linear(products, batch.decode, ws);
  if (!products.gated) {
    void* const rounded = ws.packed.ensure<uint16_t>(n * w.gate.rows);
    silu_multiply(gate, up, n * w.gate.rows, operand_dtype(down.parts[0]), rounded, stream_);
    down.rounded = rounded;
  }
  add_branch(down, w.mlp_out_norm, w.down.rows, batch.decode, ws);
}

void CudaBackend::logits(const Weights& weights, const Batch& batch, std::span<const int32_t> rows,
                         const float* x, float* logits, Workspace& workspace) {
  const Turn turn(*this);
  CudaWorkspace& ws = on_cuda(workspace);
  const Matrix& head = weights.lm_head;
  const int32_t n = static_cast<int32_t>(rows.size());
  // Rows as they come need no list.
  const int32_t* list = nullptr;
  for (int32_t i = 0; i < n; i++) {
    if (rows[i] != i) list = ws.rows.send(rows, stream_);
    if (list != nullptr) break;
  }
  LinearArgs product = product_of({part_of(head, nullptr, logits)}, head.cols, x, n);
  if (list == nullptr) {
    product.norm = weights.final_norm;
    product.eps = eps_;
  } else {
    product.x = normalise(x, weights.final_norm, list, n, head.cols, ws);
  }
  linear(product, batch.decode || rows.size() <= batch.sequences.size(), ws);
}

void CudaBackend::top_logits(const float* logits, int64_t vocab, int32_t k,
                             std::span<TopLogits> out, Workspace& workspace) {
  if (k < 1 || k > kMaxTopLogits) {
    throw Error("top_logits takes 1 to " + std::to_string(kMaxTopLogits) + " logits, not " +
                std::to_string(k));
  }
  const Turn turn(*this);
  CudaWorkspace& ws = on_cuda(workspace);
  const int64_t n = static_cast<int64_t>(out.size());
  k = static_cast<int32_t>(std::min<int64_t>(k, vocab));
  const int64_t row_bytes = top_logits_row_bytes(k);
  uint8_t* scratch = ws.top_scratch.ensure<uint8_t>(top_logits_scratch_bytes(n, vocab, k));
  uint8_t* device = ws.top.ensure<uint8_t>(n * row_bytes);
  cuda::top_logits(logits, n, vocab, k, scratch, device, stream_);
  std::vector<uint8_t> rows(n * row_bytes);
  copy_to_host(rows.data(), device, n * row_bytes, stream_);
  cuda::synchronize(stream_);
  for (int64_t i = 0; i < n; i++) {
    const uint8_t* from = rows.data() + i * row_bytes;
    TopSummary summary;
    std::memcpy(&summary, from, sizeof summary);
    out[i].exp_sum = summary.exp_sum;
    out[i].regular = summary.regular != 0;
    out[i].values.resize(k);
    out[i].ids.resize(k);
    for (int32_t j = 0; j < k; j++) {
      TopPair pair;
      std::memcpy(&pair, from + sizeof summary + j * sizeof pair, sizeof pair);
      out[i].values[j] = pair.value;
      out[i].ids[j] = pair.id;
    }
  }
}

void CudaBackend::commit(std::span<const CommitStep> steps, int32_t first_layer, int32_t n_layers,
                         Workspace& workspace) {
  const Turn turn(*this);
  CudaWorkspace& ws = on_cuda(workspace);
  const std::vector<CommitView> views(steps.begin(), steps.end());
  const CommitView* device_views = ws.commits.send(views, stream_);
  const auto layout_of = [](const CommitStep& s) -> const StoreLayout& { return *s.layout; };
  bool quantises = false;
  for (const CommitStep& step : steps) {
    const StoreLayout& layout = layout_of(step);
    quantises = quantises || has_scales(layout.k.dtype) || has_scales(layout.v.dtype);
  }
  CompressArgs args;
  args.bad_row = ws.bad_row.ensure<int32_t>(1);
  auto& unchecked = unchecked_[std::this_thread::get_id()];
  const bool first_of_call =
      std::find(unchecked.begin(), unchecked.end(), ws.bad_row_host) == unchecked.end();
  if (quantises && first_of_call) {
    const int32_t none = kAllFinite;
    copy_to_device(args.bad_row, &none, sizeof none, stream_);
  }
  args.first_layer = first_layer;
  args.n_layers = n_layers;
  args.tail_dtype = dtype_;
  for_layouts(steps, layout_of, [&](int32_t first, int32_t count) {
    args.steps = device_views + first;
    args.n_steps = count;
    args.layout = layout_of(steps[first]);
    args.max_new_blocks = 0;
    for (int32_t i = first; i < first + count; i++) {
      args.max_new_blocks = std::max(args.max_new_blocks, steps[i].n_new_blocks);
    }
    if (args.max_new_blocks > 0) compress(args, stream_);
    move_rest(args, stream_);
  });
  if (!quantises) return;
  copy_to_host(ws.bad_row_host->value(), args.bad_row, sizeof(int32_t), stream_);
  if (first_of_call) unchecked.push_back(ws.bad_row_host);
}

void CudaBackend::synchronize() {
  const Turn turn(*this);
  cuda::synchronize(stream_);
  const auto it = unchecked_.find(std::this_thread::get_id());
  if (it == unchecked_.end()) return;
  const auto flags = std::move(it->second);
  unchecked_.erase(it);
  for (const auto& flag : flags) {
    const int32_t bad = *flag->value();
    if (bad == kAllFinite) continue;
    const int32_t plane = bad / kBadRowPositions;
    throw StateError(std::string(plane % 2 == 0 ? "key" : "value") + " of layer " +
                     std::to_string(plane / 2) + " at position " +
                     std::to_string(bad % kBadRowPositions) +
                     " is not finite and can't be stored as an integer; use a float value_dtype");
  }
}

void CudaBackend::decode_step(const Batch& batch, std::span<const int32_t> token_ids,
                              std::span<const void* const> buffers, Workspace& workspace,
                              const std::function<void()>& body) {
  const Turn turn(*this);
  StepKey key;
  key.buffers.assign(buffers.begin(), buffers.end());
  key.n_rows = batch.n_rows;
  key.max_splits = split_bound(batch.sequences);
  for_layouts(
      batch.sequences, [](const SequenceStep& s) -> const StoreLayout& { return *s.layout; },
      [&](int32_t first, int32_t count) {
        key.runs.emplace_back(*batch.sequences[first].layout, count);
        key.loads.push_back(decode_load(batch.sequences.subspan(first, count)));
      });
  key.magnitudes = newest_magnitudes(batch) > 0;
  // What changes from step to step goes to the device before the step, recorded or not.
  key.buffers.push_back(send_tokens(token_ids));
  send_sequences(batch, on_cuda(workspace));
  on_cuda(workspace).append_addresses(key.buffers);
  const auto it = std::find_if(steps_.begin(), steps_.end(),
                               [&](const RecordedStep& step) { return step.key == key; });
  if (it == steps_.end()) {
    // The first time grows every buffer; the second records.
    body();
    // Under the addresses as they are now: what body grew has moved.
    key.buffers.resize(buffers.size() + 1);
    on_cuda(workspace).append_addresses(key.buffers);
    if (steps_.size() == kMaxRecordedSteps) {
      destroy_graph(steps_.front().graph);
      steps_.erase(steps_.begin());
    }
    steps_.push_back({key, nullptr});
    return;
  }
  if (it->graph == nullptr) {
    it->graph = record_graph(stream_, body);
    if (it->graph == nullptr) return;  // no graphs here: body has run
  }
  run_graph(it->graph, stream_);
}

std::unique_ptr<Backend> make_cuda_backend(const ModelConfig& config, DType dtype, int32_t device) {
  return std::make_unique<CudaBackend>(config, dtype, device);
}

}  // namespace mustafar::cuda
