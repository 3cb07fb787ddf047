#include "runtime/kv_statistics.h"

#include <stdexcept>
#include <string>

#include "model/llama.h"
#include "mustafar/error.h"
#include "runtime/model_impl.h"

namespace mustafar {
namespace {

// Adds the sum of x^T x over n rows to out [d][d]. f32 inside a call: n is a chunk of a prompt.
class MomentSum {
 public:
  explicit MomentSum(int32_t d) : d_(d), sum_(int64_t{d} * d) {}

  void add(const float* row) {
    for (int32_t i = 0; i < d_; i++) {
      const float x = row[i];
      float* out = sum_.data() + int64_t{i} * d_;
      for (int32_t j = 0; j < d_; j++) out[j] += x * row[j];
    }
  }
  void flush(double* out) {
    for (size_t i = 0; i < sum_.size(); i++) {
      out[i] += sum_[i];
      sum_[i] = 0;
    }
  }

 private:
  int32_t d_;
  std::vector<float> sum_;
};

}  // namespace

KVStatistics gather_kv_statistics(const Model& model,
                                  std::span<const std::vector<int32_t>> sequences,
                                  const std::function<void(int64_t, int64_t)>& between) {
  Model::Impl& engine = *model.impl();
  const ModelConfig& c = engine.config;
  if (!engine.backend->host_memory()) {
    throw Error("calibration needs the model on device=\"cpu\", it is on \"" +
                engine.backend->device() + "\"");
  }
  const int32_t d = c.head_dim, group = c.n_heads / c.n_kv_heads;
  const int64_t square = int64_t{d} * d, all = int64_t{c.n_layers} * c.n_kv_heads * square;
  KVStatistics statistics;
  for (auto* moments :
       {&statistics.keys, &statistics.values, &statistics.queries, &statistics.outputs}) {
    moments->assign(all, 0.0);
  }

  MomentSum sum(d);
  std::vector<float> row(d);
  const auto observe = [&](int32_t layer, const Batch& batch, const float* q) {
    const SequenceStep& step = batch.sequences[0];
    const int64_t first = step.pos0 - step.fresh_pos0;
    for (int32_t head = 0; head < c.n_kv_heads; head++) {
      const int64_t at = (int64_t{layer} * c.n_kv_heads + head) * square;
      for (const bool is_key : {true, false}) {
        const int64_t plane = (is_key ? 0 : c.n_kv_heads) + head;
        for (int64_t i = first; i < first + step.n_rows; i++) {
          for (int32_t j = 0; j < d; j++) {
            row[j] =
                load_float(step.fresh, engine.dtype, (plane * step.fresh_capacity + i) * d + j);
          }
          sum.add(row.data());
        }
        sum.flush((is_key ? statistics.keys : statistics.values).data() + at);
      }
      for (int64_t i = 0; i < step.n_rows; i++) {
        for (int32_t h = head * group; h < (head + 1) * group; h++) {
          sum.add(q + (i * c.n_heads + h) * d);
        }
      }
      sum.flush(statistics.queries.data() + at);
    }
  };

  KVConfig dense;
  dense.sparsity = 0;
  const std::shared_ptr<const CacheSpec> spec = engine.cache_spec(dense);
  ForwardBuffers buffers(*engine.backend);
  int64_t total = 0;
  for (const auto& sequence : sequences) total += static_cast<int64_t>(sequence.size());
  for (const auto& sequence : sequences) {
    const int64_t n = static_cast<int64_t>(sequence.size());
    if (n == 0) continue;
    if (n > c.max_position_embeddings) {
      throw ContextOverflow("a calibration text has " + std::to_string(n) +
                            " tokens, more than the model's context of " +
                            std::to_string(c.max_position_embeddings));
    }
    for (int32_t id : sequence) {
      if (id < 0 || id >= c.vocab_size) {
        throw std::invalid_argument("token id " + std::to_string(id) +
                                    " is outside the vocabulary of " +
                                    std::to_string(c.vocab_size));
      }
    }
    SequenceCache cache = engine.new_cache(spec);
    Prefill prefill(*engine.llama, cache, sequence, buffers);
    prefill.observe(observe);
    while (prefill.step([&](int64_t done, int64_t in_all) {
      if (between) between(statistics.tokens + n * done / in_all, total);
    })) {
    }
    statistics.tokens += n;
  }

  const int64_t width = int64_t{c.n_heads} * d;
  for (int32_t layer = 0; layer < c.n_layers; layer++) {
    const StoredTensor o =
        engine.source->tensor("model.layers." + std::to_string(layer) + ".self_attn.o_proj.weight",
                              {c.hidden_size, width});
    for (int32_t head = 0; head < c.n_kv_heads; head++) {
      for (int64_t i = 0; i < c.hidden_size; i++) {
        for (int32_t h = head * group; h < (head + 1) * group; h++) {
          for (int32_t j = 0; j < d; j++) {
            row[j] = load_float(o.data, o.dtype, i * width + int64_t{h} * d + j);
          }
          sum.add(row.data());
        }
      }
      sum.flush(statistics.outputs.data() + (int64_t{layer} * c.n_kv_heads + head) * square);
    }
  }
  return statistics;
}

}  // namespace mustafar
