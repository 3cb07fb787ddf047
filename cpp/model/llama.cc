#include "model/llama.h"

#include <algorithm>
#include <utility>

namespace mustafar {

ForwardBuffers::ForwardBuffers(Backend& backend)
    : backend_(backend), workspace_(backend.make_workspace()) {}

float* ForwardBuffers::ensure(std::unique_ptr<DeviceMemory>& memory, int64_t values) {
  const int64_t bytes = values * static_cast<int64_t>(sizeof(float));
  if (memory == nullptr || memory->bytes() < bytes) {
    memory.reset();
    memory = backend_.allocate(bytes);
  }
  return static_cast<float*>(memory->data());
}

int64_t ForwardBuffers::bytes() const {
  int64_t bytes = workspace_->bytes();
  for (const auto* memory : {&x_, &q_, &attention_, &logits_}) {
    if (*memory != nullptr) bytes += (*memory)->bytes();
  }
  return bytes;
}

void Llama::run_layer(int32_t layer, const Batch& batch, float* x, ForwardBuffers& buffers,
                      const Observer& observer) const {
  const int64_t width = int64_t{config_.n_heads} * config_.head_dim;
  Workspace& workspace = buffers.workspace();
  float* q = buffers.q(batch.n_rows * width);
  float* attention = buffers.attention(batch.n_rows * width);
  backend_.project_qkv(weights_, layer, batch, x, q, workspace);
  if (observer) observer(layer, batch, q);
  backend_.attend(layer, batch, q, attention, workspace);
  backend_.project_output(weights_, layer, batch, attention, x, workspace);
  backend_.mlp(weights_, layer, batch, x, workspace);
}

void Llama::run_decode(std::span<SequenceCache* const> caches, std::span<const int32_t> tokens,
                       float* rows, const std::function<void()>& fetch,
                       ForwardBuffers& buffers) const {
  const int32_t n = static_cast<int32_t>(caches.size());
  std::vector<PendingAppend> pending(n);
  std::vector<SequenceStep> steps(n);
  std::vector<int32_t> row_list(n);
  for (int32_t i = 0; i < n; i++) {
    pending[i] = caches[i]->prepare(1, /*in_place=*/true);
    steps[i] = caches[i]->view(pending[i]);
    steps[i].row0 = row_list[i] = i;
  }
  const Batch batch{steps, n, /*decode=*/true};

  const int64_t width = int64_t{config_.n_heads} * config_.head_dim;
  float* x = buffers.x(int64_t{n} * config_.hidden_size);
  const void* const used[] = {&weights_, x, rows, buffers.q(n * width),
                              buffers.attention(n * width)};
  for (int32_t i = 0; i < n; i++) caches[i]->copy_to_grown(pending[i], buffers.workspace());
  backend_.decode_step(batch, tokens, used, buffers.workspace(), [&] {
    backend_.embed(weights_, tokens, x);
    for (int32_t layer = 0; layer < config_.n_layers; layer++) run_layer(layer, batch, x, buffers);
    backend_.logits(weights_, batch, row_list, x, rows, buffers.workspace());
  });
  fetch();
  check_weights();

  std::vector<CommitStep> commits;
  for (int32_t i = 0; i < n; i++) {
    if (!pending[i].new_pages.empty()) {
      commits.push_back(caches[i]->commit_view(pending[i], steps[i]));
    }
  }
  if (!commits.empty()) backend_.commit(commits, 0, config_.n_layers, buffers.workspace());
  backend_.synchronize();
  for (int32_t i = 0; i < n; i++) caches[i]->apply(std::move(pending[i]));
}

void Llama::decode(std::span<SequenceCache* const> caches, std::span<const int32_t> tokens,
                   float* logits, ForwardBuffers& buffers) const {
  const int64_t n_logits = static_cast<int64_t>(caches.size()) * config_.vocab_size;
  float* const rows = backend_.host_memory() ? logits : buffers.logits(n_logits);
  const auto fetch = [&] {
    if (rows != logits) backend_.download(logits, rows, n_logits * 4);
  };
  run_decode(caches, tokens, rows, fetch, buffers);
}

void Llama::decode_top(std::span<SequenceCache* const> caches, std::span<const int32_t> tokens,
                       int32_t top_k, std::span<TopLogits> top, ForwardBuffers& buffers) const {
  const int64_t vocab = config_.vocab_size;
  float* const rows = buffers.logits(static_cast<int64_t>(caches.size()) * vocab);
  const auto fetch = [&] { backend_.top_logits(rows, vocab, top_k, top, buffers.workspace()); };
  run_decode(caches, tokens, rows, fetch, buffers);
}

Prefill::Prefill(const Llama& llama, SequenceCache& cache, std::vector<int32_t> tokens,
                 ForwardBuffers& buffers)
    : Prefill(llama, std::vector<PrefillPart>{{&cache, std::move(tokens)}}, buffers) {}

Prefill::Prefill(const Llama& llama, std::vector<PrefillPart> parts, ForwardBuffers& buffers)
    : llama_(llama), buffers_(buffers) {
  std::vector<int32_t> tokens;
  for (const PrefillPart& given : parts) {
    Part part;
    part.cache = given.cache;
    part.row0 = n_rows_;
    part.n = static_cast<int64_t>(given.tokens.size());
    part.pending = given.cache->prepare(part.n, /*in_place=*/false);
    part.fresh = given.cache->fresh(part.n);
    n_rows_ += part.n;
    parts_.push_back(std::move(part));
    tokens.insert(tokens.end(), given.tokens.begin(), given.tokens.end());
  }
  x_ = buffers_.x(n_rows_ * llama_.config_.hidden_size);
  llama_.backend_.embed(llama_.weights_, tokens, x_);
}

Prefill::~Prefill() = default;

std::vector<SequenceStep> Prefill::chunk_of(std::span<const SequenceStep> calls, int64_t first,
                                            int64_t n) const {
  std::vector<SequenceStep> steps;
  for (size_t i = 0; i < parts_.size(); i++) {
    const int64_t begin = std::max(first, parts_[i].row0);
    const int64_t end = std::min(first + n, parts_[i].row0 + parts_[i].n);
    if (begin >= end) continue;
    SequenceStep step = calls[i];
    step.row0 = static_cast<int32_t>(begin - first);
    step.n_rows = static_cast<int32_t>(end - begin);
    step.pos0 = calls[i].pos0 + static_cast<int32_t>(begin - parts_[i].row0);
    steps.push_back(step);
  }
  return steps;
}

int64_t Prefill::next_rows() const {
  return std::min(llama_.backend_.prefill_rows(), n_rows_ - next_row_);
}

bool Prefill::step(const std::function<void(int64_t, int64_t)>& between) {
  const int64_t n_layers = llama_.config_.n_layers;
  const int64_t end = std::min(n_layers, int64_t{layer_} + 1) * n_rows_;
  for (int64_t done = layer_ * n_rows_ + next_row_; done < end;) {
    done += next_rows();
    step_rows();
    if (between) between(done, n_layers * n_rows_);
  }
  return layer_ < n_layers;
}

bool Prefill::step_rows() {
  const ModelConfig& config = llama_.config_;
  if (layer_ == config.n_layers) return false;
  if (next_row_ == 0) {
    calls_.clear();
    for (const Part& part : parts_) {
      SequenceStep& call = calls_.emplace_back(part.cache->view(part.pending));
      call.fresh = static_cast<uint8_t*>(part.fresh.data());
      call.fresh_capacity = static_cast<int32_t>(part.n);
      call.fresh_pos0 = call.pos0;
    }
  }
  // Rows see keys and values of earlier rows only, so a chunk can pass through the whole layer.
  const int64_t rows = next_rows();
  const std::vector<SequenceStep> steps = chunk_of(calls_, next_row_, rows);
  const Batch batch{steps, static_cast<int32_t>(rows), /*decode=*/false};
  llama_.run_layer(layer_, batch, x_ + next_row_ * config.hidden_size, buffers_, observer_);
  next_row_ += rows;
  if (next_row_ == n_rows_) {
    llama_.check_weights();
    commit_layer();
    layer_++;
    next_row_ = 0;
  }
  return layer_ < config.n_layers;
}

void Prefill::commit_layer() {
  std::vector<CommitStep> commits;
  for (size_t i = 0; i < parts_.size(); i++) {
    commits.push_back(parts_[i].cache->commit_view(parts_[i].pending, calls_[i]));
  }
  llama_.backend_.commit(commits, layer_, 1, buffers_.workspace());
}

void Prefill::compute_logits(int64_t first, int64_t n, float* out) {
  std::vector<int32_t> rows(n);
  for (int64_t i = 0; i < n; i++) rows[i] = static_cast<int32_t>(i);
  const Batch batch{{}, static_cast<int32_t>(n), /*decode=*/false};
  llama_.backend_.logits(llama_.weights_, batch, rows, x_ + first * llama_.config_.hidden_size, out,
                         buffers_.workspace());
  llama_.check_weights();
}

void Prefill::logits(int64_t first, int64_t n, float* out) {
  const int64_t vocab = llama_.config_.vocab_size;
  Backend& backend = llama_.backend_;
  if (backend.host_memory()) {
    compute_logits(first, n, out);
  } else {
    backend.download(out, device_logits(first, n), n * vocab * 4);
  }
}

const float* Prefill::device_logits(int64_t first, int64_t n) {
  float* const device = buffers_.logits(n * llama_.config_.vocab_size);
  compute_logits(first, n, device);
  return device;
}

void Prefill::last_logits(float* out) {
  std::vector<int32_t> rows;
  for (size_t i = 0; i < parts_.size(); i++) rows.push_back(static_cast<int32_t>(last_row(i)));
  const Batch batch{{}, static_cast<int32_t>(n_rows_), /*decode=*/false};
  llama_.backend_.logits(llama_.weights_, batch, rows, x_, out, buffers_.workspace());
  llama_.check_weights();
}

TopLogits Prefill::top_logits(int64_t row, int32_t top_k) {
  const float* const device = device_logits(row, 1);
  TopLogits top;
  llama_.backend_.top_logits(device, llama_.config_.vocab_size, top_k, {&top, 1},
                             buffers_.workspace());
  return top;
}

void Prefill::finish() {
  llama_.backend_.synchronize();
  for (Part& part : parts_) part.cache->apply(std::move(part.pending));
}

}  // namespace mustafar
