#include "runtime/kv_statistics.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "model/llama.h"
#include "mustafar/error.h"
#include "runtime/model_impl.h"
#include "runtime/prompt_ids.h"

namespace mustafar {
namespace {

// Adds the sum of x^T x over n rows to out [d][d]. f32 inside a call: n is a chunk of a prompt.
class MomentSum {
 public:
  explicit MomentSum(int32_t d) : d_(d), rows_(kRows * int64_t{d}), sum_(int64_t{d} * d) {}

  // load(i, row): row [d] f32 of vector i.
  template <typename Load>
  void add(int64_t n, Load&& load, double* out) {
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    for (int64_t first = 0; first < n; first += kRows) {
      for (int64_t i = 0; i < kRows; i++) {
        float* row = rows_.data() + i * d_;
        if (first + i < n) {
          load(first + i, row);
        } else {
          std::fill_n(row, d_, 0.0f);
        }
      }
      add_rows();
    }
    for (int32_t i = 0; i < d_; i++) {
      for (int32_t j = i; j < d_; j++) {
        const double x = sum_[int64_t{i} * d_ + j];
        out[int64_t{i} * d_ + j] += x;
        if (i != j) out[int64_t{j} * d_ + i] += x;
      }
    }
  }

 private:
  static constexpr int64_t kRows = 4;  // that go through the sum together: it is read once for all

  void add_rows() {
    const float* a = rows_.data();
    const float *b = a + d_, *c = b + d_, *e = c + d_;
    for (int32_t i = 0; i < d_; i++) {
      float* out = sum_.data() + int64_t{i} * d_;
      for (int32_t j = i; j < d_; j++) {
        out[j] += (a[i] * a[j] + b[i] * b[j]) + (c[i] * c[j] + e[i] * e[j]);
      }
    }
  }

  int64_t d_;
  std::vector<float> rows_;  // [kRows][d]
  std::vector<float> sum_;   // [d][d], the upper triangle
};

// Sums over what a prefill shows of each layer.
class Gatherer {
 public:
  Gatherer(const Model::Impl& engine, int32_t skip, ThreadPool& pool, KVStatistics& out)
      : engine_(engine),
        config_(engine.config),
        skip_(skip),
        group_(config_.n_heads / config_.n_kv_heads),
        square_(int64_t{config_.head_dim} * config_.head_dim),
        pool_(pool),
        sums_(pool.size(), MomentSum(config_.head_dim)),
        out_(out) {
    const int64_t all = int64_t{config_.n_layers} * config_.n_kv_heads * square_;
    for (auto* moments : {&out.keys, &out.values, &out.queries, &out.outputs}) {
      moments->assign(all, 0.0);
    }
  }

  // q: [n_rows][n_heads * D] f32 on the device; keys and values: SequenceView::fresh.
  void observe(int32_t layer, const Batch& batch, const float* q) {
    const SequenceStep& step = batch.sequences[0];
    const int32_t skipped = std::clamp(skip_ - step.pos0, 0, step.n_rows);
    const int64_t n = step.n_rows - skipped;
    if (n == 0) return;
    const Rows rows = fetch(step, skipped, n, q + int64_t{skipped} * config_.n_heads * d());

    const auto vectors = [&](int32_t kind, int64_t head) {
      const uint8_t* first = fresh_rows(rows.fresh, kind, head) + rows.first * row_bytes();
      return [first, this](int64_t i, float* row) {
        for (int64_t j = 0; j < d(); j++) row[j] = load_float(first, engine_.dtype, i * d() + j);
      };
    };
    // Queries first: they take the longest.
    const int64_t heads = config_.n_kv_heads;
    pool_.parallel_for(3 * heads, [&](int64_t task, int worker) {
      const int64_t head = task % heads;
      MomentSum& sum = sums_[worker];
      if (task >= heads) {
        const bool keys = task < 2 * heads;
        sum.add(n, vectors(keys ? kKeys : kValues, head),
                at(keys ? out_.keys : out_.values, layer, head));
        return;
      }
      for (int64_t h = head * group_; h < (head + 1) * group_; h++) {
        const auto query = [&](int64_t i, float* row) {
          std::copy_n(rows.q + (i * config_.n_heads + h) * d(), d(), row);
        };
        sum.add(n, query, at(out_.queries, layer, head));
      }
    });
  }

  // The output projection's slices, layer after layer; between: may throw to stop.
  void add_outputs(const std::function<void()>& between) {
    const int64_t width = int64_t{config_.n_heads} * d();
    for (int32_t layer = 0; layer < config_.n_layers; layer++) {
      const StoredTensor o = engine_.source->tensor(
          "model.layers." + std::to_string(layer) + ".self_attn.o_proj.weight",
          {config_.hidden_size, width});
      engine_.source->prepare(o.data, dtype_bytes(o.dtype, config_.hidden_size * width));
      pool_.parallel_for(config_.n_kv_heads, [&](int64_t head, int worker) {
        for (int64_t h = head * group_; h < (head + 1) * group_; h++) {
          const auto slice = [&](int64_t i, float* row) {
            for (int64_t j = 0; j < d(); j++) {
              row[j] = load_float(o.data, o.dtype, i * width + h * d() + j);
            }
          };
          sums_[worker].add(config_.hidden_size, slice, at(out_.outputs, layer, head));
        }
      });
      engine_.source->check_read();
      between();
    }
  }

 private:
  // A chunk's rows in host memory.
  struct Rows {
    SequenceView fresh;        // its fresh buffer alone
    int64_t first = 0;         // of the chunk's tokens in that
    const float* q = nullptr;  // [n][n_heads * D]
  };

  int64_t d() const { return config_.head_dim; }
  int64_t row_bytes() const { return dtype_bytes(engine_.dtype, d()); }
  uint8_t* fresh_rows(const SequenceView& view, int32_t kind, int64_t head) const {
    return view.fresh +
           fresh_offset(view, kind, config_.n_kv_heads, static_cast<int32_t>(head), row_bytes());
  }
  double* at(std::vector<double>& moments, int64_t layer, int64_t head) const {
    return moments.data() + (layer * config_.n_kv_heads + head) * square_;
  }

  Rows fetch(const SequenceView& step, int32_t skipped, int64_t n, const float* q) {
    const int64_t first = step.pos0 + skipped - step.fresh_pos0;
    Backend& backend = *engine_.backend;
    if (backend.host_memory()) return {step, first, q};
    SequenceView copy;
    fresh_.resize(2 * config_.n_kv_heads * n * row_bytes());
    copy.fresh = fresh_.data();
    copy.fresh_capacity = static_cast<int32_t>(n);
    for (const int32_t kind : {kKeys, kValues}) {
      for (int32_t head = 0; head < config_.n_kv_heads; head++) {
        backend.download(fresh_rows(copy, kind, head),
                         fresh_rows(step, kind, head) + first * row_bytes(), n * row_bytes());
      }
    }
    q_.resize(n * config_.n_heads * d());
    backend.download(q_.data(), q, static_cast<int64_t>(q_.size()) * 4);
    return {copy, 0, q_.data()};
  }

  const Model::Impl& engine_;
  const ModelConfig& config_;
  int32_t skip_;
  int64_t group_, square_;
  ThreadPool& pool_;
  std::vector<MomentSum> sums_;  // one per worker
  std::vector<uint8_t> fresh_;   // copies of device memory
  std::vector<float> q_;
  KVStatistics& out_;
};

}  // namespace

KVStatistics gather_kv_statistics(const Model& model,
                                  std::span<const std::vector<int32_t>> sequences, int32_t skip,
                                  ThreadPool& pool,
                                  const std::function<void(int64_t, int64_t)>& between) {
  Model::Impl& engine = *model.impl();
  const ModelConfig& c = engine.config;
  int64_t total = 0;
  for (const auto& sequence : sequences) {
    const int64_t n = static_cast<int64_t>(sequence.size());
    total += n;
    if (n > c.max_position_embeddings) {
      throw ContextOverflow("a calibration text has " + std::to_string(n) +
                            " tokens, more than the model's context of " +
                            std::to_string(c.max_position_embeddings));
    }
    check_token_ids(sequence, c.vocab_size);
  }

  KVStatistics statistics;
  Gatherer gatherer(engine, skip, pool, statistics);
  const KVConfig dense = find_kv_preset("dense").config;
  const std::shared_ptr<const CacheSpec> spec = engine.cache_spec(dense);
  ForwardBuffers buffers(*engine.backend);
  int64_t done = 0;
  for (const auto& sequence : sequences) {
    const int64_t n = static_cast<int64_t>(sequence.size());
    if (n <= skip) {
      done += n;
      continue;
    }
    SequenceCache cache = engine.new_cache(spec, n);
    Prefill prefill(*engine.llama, cache, sequence, buffers);
    prefill.observe([&](int32_t layer, const Batch& batch, const float* q) {
      gatherer.observe(layer, batch, q);
    });
    while (prefill.step([&](int64_t part, int64_t in_all) {
      if (between) between(done + n * part / in_all, total);
    })) {
    }
    done += n;
    statistics.tokens += n - skip;
  }
  gatherer.add_outputs([&] {
    if (between) between(total, total);
  });
  return statistics;
}

}  // namespace mustafar
