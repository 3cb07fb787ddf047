// Every operation of the CPU backend, for every instruction set this machine runs, against the same
// operation written plainly in double.
#include "backend/cpu/cpu_backend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "format/pack.h"

namespace mustafar {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int32_t hidden, intermediate, n_heads, n_kv_heads, head_dim, vocab;
  bool bias;
};

constexpr Shape kShapes[] = {
    {48, 100, 4, 4, 8, 37, false},    // MHA
    {64, 176, 8, 2, 16, 65, true},    // GQA 4
    {40, 33, 2, 1, 64, 129, false},   // MQA, odd inner size
    {96, 128, 4, 2, 80, 50, true},    // head_dim that 32 doesn't divide
    {128, 256, 8, 1, 128, 96, false}  // GQA 8
};

// A model of random weights in `stored` with the plain operations over them.
class Reference {
 public:
  Reference(const Shape& shape, DType stored, int32_t n_layers, uint32_t seed)
      : shape_(shape), stored_(stored), engine_(seed) {
    config.hidden_size = shape.hidden;
    config.intermediate_size = shape.intermediate;
    config.n_layers = n_layers;
    config.n_heads = shape.n_heads;
    config.n_kv_heads = shape.n_kv_heads;
    config.head_dim = shape.head_dim;
    config.vocab_size = shape.vocab;
    config.rms_norm_eps = 1e-5;
    weights.embedding = matrix(shape.vocab, shape.hidden);
    weights.lm_head = matrix(shape.vocab, shape.hidden);
    weights.final_norm = vector(shape.hidden);
    float* frequencies = vector(shape.head_dim / 2);
    for (int i = 0; i < shape.head_dim / 2; i++) {
      frequencies[i] = std::pow(10000.0f, -2.0f * i / shape.head_dim);
    }
    weights.rope_frequencies = frequencies;
    const int32_t q_dim = shape.n_heads * shape.head_dim,
                  kv_dim = shape.n_kv_heads * shape.head_dim;
    for (int32_t l = 0; l < n_layers; l++) {
      LayerWeights w;
      w.attention_norm = vector(shape.hidden);
      w.mlp_norm = vector(shape.hidden);
      w.q = matrix(q_dim, shape.hidden);
      w.k = matrix(kv_dim, shape.hidden);
      w.v = matrix(kv_dim, shape.hidden);
      w.o = matrix(shape.hidden, q_dim);
      w.gate = matrix(shape.intermediate, shape.hidden);
      w.up = matrix(shape.intermediate, shape.hidden);
      w.down = matrix(shape.hidden, shape.intermediate);
      if (shape.bias) {
        w.q_bias = vector(q_dim);
        w.k_bias = vector(kv_dim);
        w.v_bias = vector(kv_dim);
        w.o_bias = vector(shape.hidden);
        w.gate_bias = vector(shape.intermediate);
        w.up_bias = vector(shape.intermediate);
        w.down_bias = vector(shape.hidden);
      }
      weights.layers.push_back(w);
    }
  }

  std::vector<float> random(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> x(n);
    for (float& v : x) v = distribution(engine_);
    return x;
  }
  float* vector(int64_t n) {
    vectors_.push_back(std::make_unique<std::vector<float>>(random(n)));
    return vectors_.back()->data();
  }
  Matrix matrix(int64_t rows, int64_t cols) {
    const std::vector<float> x = random(rows * cols, 1.0f / std::sqrt(static_cast<float>(cols)));
    bytes_.push_back(std::make_unique<std::vector<uint8_t>>(dtype_bytes(stored_, rows * cols)));
    for (int64_t i = 0; i < rows * cols; i++) store_float(bytes_.back()->data(), stored_, i, x[i]);
    return {bytes_.back()->data(), stored_, rows, cols};
  }

  std::vector<double> norm(const float* x, const float* weight) const {
    double square = 0;
    for (int i = 0; i < shape_.hidden; i++) square += double{x[i]} * x[i];
    const double scale = 1.0 / std::sqrt(square / shape_.hidden + 1e-5);
    std::vector<double> out(shape_.hidden);
    for (int i = 0; i < shape_.hidden; i++) out[i] = x[i] * scale * weight[i];
    return out;
  }
  static std::vector<double> linear(const Matrix& w, const float* bias,
                                    const std::vector<double>& x) {
    std::vector<double> y(w.rows);
    for (int64_t r = 0; r < w.rows; r++) {
      double sum = bias != nullptr ? bias[r] : 0.0;
      for (int64_t c = 0; c < w.cols; c++)
        sum += load_float(w.data, w.dtype, r * w.cols + c) * x[c];
      y[r] = sum;
    }
    return y;
  }
  void rope(double* x, int32_t position) const {
    const int half = shape_.head_dim / 2;
    for (int i = 0; i < half; i++) {
      const float angle = static_cast<float>(position) * weights.rope_frequencies[i];
      const double c = std::cos(double{angle}), s = std::sin(double{angle});
      const double a = x[i], b = x[i + half];
      x[i] = a * c - b * s;
      x[i + half] = b * c + a * s;
    }
  }

  ModelConfig config;
  Weights weights;

 private:
  Shape shape_;
  DType stored_;
  std::mt19937 engine_;
  std::vector<std::unique_ptr<std::vector<float>>> vectors_;
  std::vector<std::unique_ptr<std::vector<uint8_t>>> bytes_;
};

// Normalised mean squared error and the largest error relative to the root mean square.
void expect_close(const std::vector<float>& got, const std::vector<double>& expected, double nmse,
                  double largest, const std::string& what) {
  ASSERT_EQ(got.size(), expected.size());
  double error = 0, size = 0, worst = 0;
  for (size_t i = 0; i < got.size(); i++) {
    ASSERT_FALSE(std::isnan(got[i])) << what << " at " << i;
    const double d = got[i] - expected[i];
    error += d * d;
    size += expected[i] * expected[i];
    worst = std::max(worst, std::abs(d));
  }
  EXPECT_LE(error, nmse * size) << what;
  EXPECT_LE(worst, largest * std::sqrt(size / got.size())) << what;
}

struct Tolerance {
  double nmse, largest;
};
// f32: rounding of sums of some hundred terms. Otherwise prefill rounds activations, keys and
// probabilities to bf16 (2^-9 each), or the cache to f16.
Tolerance tolerance_of(DType dtype, bool gemm) {
  if (dtype == DType::kF32) return {1e-12, 1e-5};
  if (dtype == DType::kF16) return {1e-6, 5e-3};
  return gemm ? Tolerance{3e-5, 5e-2} : Tolerance{1e-5, 3e-2};
}

class CpuBackendTest : public testing::TestWithParam<std::tuple<Isa, DType>> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  std::unique_ptr<CpuBackend> make(const ModelConfig& config, int threads = 1) const {
    return std::make_unique<CpuBackend>(config, dtype(), threads, isa());
  }
  static void poison(Workspace& workspace) {
    CpuWorkspace& ws = static_cast<CpuWorkspace&>(workspace);
    for (HostBuffer* b : {&ws.normed, &ws.keys, &ws.values, &ws.gated, &ws.packed, &ws.branch,
                          &ws.rope, &ws.attention}) {
      if (b->bytes() > 0) std::memset(b->data(), 0xff, b->bytes());
    }
    for (HostBuffer& b : ws.workers) std::memset(b.data(), 0xff, b.bytes());
    ws.rope_rows.clear();
  }
};

std::string param_name(const testing::TestParamInfo<std::tuple<Isa, DType>>& info) {
  return std::string(isa_name(std::get<0>(info.param))) + "_" + dtype_name(std::get<1>(info.param));
}
INSTANTIATE_TEST_SUITE_P(Isa, CpuBackendTest,
                         testing::Combine(testing::ValuesIn(available_isas()),
                                          testing::Values(DType::kF32, DType::kF16, DType::kBF16)),
                         param_name);

// The cache of one sequence of a test: buffers and their step.
struct Sequence {
  SequenceStep step;
  std::vector<uint8_t> dense, fresh;
  Sequence(const Shape& s, int32_t n_layers, DType dtype, int32_t row0, int32_t n_rows,
           int32_t pos0, bool decode) {
    step.row0 = row0;
    step.n_rows = n_rows;
    step.pos0 = pos0;
    step.dense_capacity = pos0 + 3;
    step.dense_tokens = pos0;
    const int64_t row = int64_t{2} * s.n_kv_heads * s.head_dim;
    dense.assign(dtype_bytes(dtype, n_layers * row * step.dense_capacity), 0xff);
    step.dense = dense.data();
    if (!decode) {
      step.fresh_capacity = n_rows + 2;
      step.fresh_pos0 = pos0;
      fresh.assign(dtype_bytes(dtype, row * step.fresh_capacity), 0xff);
      step.fresh = fresh.data();
    }
  }
};

TEST_P(CpuBackendTest, Embed) {
  Reference reference(kShapes[1], dtype(), 1, 1);
  auto backend = make(reference.config);
  const int32_t ids[] = {64, 0, 7, 7};
  std::vector<float> out(4 * 64, kNaN);
  backend->embed(reference.weights, ids, out.data());
  const Matrix& table = reference.weights.embedding;
  for (int i = 0; i < 4; i++) {
    for (int c = 0; c < 64; c++) {
      EXPECT_EQ(out[i * 64 + c], load_float(table.data, table.dtype, ids[i] * 64 + c));
    }
  }
}

TEST_P(CpuBackendTest, ProjectQkv) {
  for (const Shape& shape : kShapes) {
    for (bool decode : {true, false}) {
      Reference reference(shape, dtype(), 2, 2);
      auto backend = make(reference.config);
      auto workspace = backend->make_workspace();
      const int32_t lengths[] = {decode ? 1 : 5, 1, decode ? 1 : 18}, positions[] = {9, 0, 130};
      std::vector<Sequence> sequences;
      int32_t rows = 0;
      for (int i = 0; i < 3; i++) {
        sequences.emplace_back(shape, 2, dtype(), rows, lengths[i], positions[i], decode);
        rows += lengths[i];
      }
      std::vector<SequenceStep> steps;
      for (const Sequence& s : sequences) steps.push_back(s.step);
      const Batch batch{steps, rows, decode};
      const std::vector<float> x = reference.random(rows * shape.hidden);
      const int32_t d = shape.head_dim, q_dim = shape.n_heads * d, kv_dim = shape.n_kv_heads * d;
      const LayerWeights& w = reference.weights.layers[1];
      const Tolerance tolerance = tolerance_of(dtype(), !decode);
      for (int round = 0; round < 2; round++) {
        std::vector<float> q(rows * q_dim, kNaN);
        backend->project_qkv(reference.weights, 1, batch, x.data(), q.data(), *workspace);
        std::vector<double> q_expected, k_expected, v_expected;
        std::vector<float> k_got, v_got;
        for (const Sequence& s : sequences) {
          for (int32_t i = 0; i < s.step.n_rows; i++) {
            const std::vector<double> n =
                reference.norm(x.data() + (s.step.row0 + i) * shape.hidden, w.attention_norm);
            std::vector<double> qr = Reference::linear(w.q, w.q_bias, n),
                                kr = Reference::linear(w.k, w.k_bias, n),
                                vr = Reference::linear(w.v, w.v_bias, n);
            for (int h = 0; h < shape.n_heads; h++) reference.rope(&qr[h * d], s.step.pos0 + i);
            for (int h = 0; h < shape.n_kv_heads; h++) reference.rope(&kr[h * d], s.step.pos0 + i);
            q_expected.insert(q_expected.end(), qr.begin(), qr.end());
            k_expected.insert(k_expected.end(), kr.begin(), kr.end());
            v_expected.insert(v_expected.end(), vr.begin(), vr.end());
            for (int j = 0; j < kv_dim; j++) {
              const int64_t head = j / d, dim = j % d;
              for (int value = 0; value < 2; value++) {
                const int64_t block = value * shape.n_kv_heads + head;
                const float stored =
                    decode ? load_float(s.step.dense, dtype(),
                                        ((2 * shape.n_kv_heads + block) * s.step.dense_capacity +
                                         s.step.dense_tokens) *
                                                d +
                                            dim)
                           : load_float(s.step.fresh, dtype(),
                                        (block * s.step.fresh_capacity + i) * d + dim);
                (value ? v_got : k_got).push_back(stored);
              }
            }
          }
        }
        expect_close(q, q_expected, tolerance.nmse, tolerance.largest, "q");
        expect_close(k_got, k_expected, tolerance.nmse, tolerance.largest, "k");
        expect_close(v_got, v_expected, tolerance.nmse, tolerance.largest, "v");
        poison(*workspace);
      }
    }
  }
}

// x += o(attention), x += mlp(x) and logits of some rows, over row counts.
TEST_P(CpuBackendTest, OutputMlpAndLogits) {
  for (const Shape& shape : kShapes) {
    constexpr int32_t kMaxRows = 33;
    Reference reference(shape, dtype(), 1, 3);
    const LayerWeights& w = reference.weights.layers[0];
    const int32_t q_dim = shape.n_heads * shape.head_dim, hidden = shape.hidden;
    const std::vector<float> attention = reference.random(kMaxRows * q_dim),
                             x0 = reference.random(kMaxRows * hidden);
    std::vector<double> output, mlp, logits;  // expected, of all rows
    for (int r = 0; r < kMaxRows; r++) {
      const float* x = &x0[r * hidden];
      std::vector<double> y = Reference::linear(
          w.o, w.o_bias, {attention.begin() + r * q_dim, attention.begin() + (r + 1) * q_dim});
      for (int i = 0; i < hidden; i++) output.push_back(x[i] + y[i]);

      const std::vector<double> n = reference.norm(x, w.mlp_norm);
      std::vector<double> gate = Reference::linear(w.gate, w.gate_bias, n);
      const std::vector<double> up = Reference::linear(w.up, w.up_bias, n);
      for (int i = 0; i < shape.intermediate; i++) {
        gate[i] = gate[i] / (1.0 + std::exp(-gate[i])) * up[i];
      }
      y = Reference::linear(w.down, w.down_bias, gate);
      for (int i = 0; i < hidden; i++) mlp.push_back(x[i] + y[i]);

      y = Reference::linear(reference.weights.lm_head, nullptr,
                            reference.norm(x, reference.weights.final_norm));
      logits.insert(logits.end(), y.begin(), y.end());
    }

    auto backend = make(reference.config);
    auto workspace = backend->make_workspace();
    for (int32_t rows : {1, 2, 3, 7, 16, 33}) {
      for (bool decode : {true, false}) {
        const Tolerance tolerance = tolerance_of(dtype(), !decode);
        const std::string what = std::to_string(rows) + (decode ? " decode rows" : " prefill rows");
        std::vector<SequenceStep> steps(decode ? rows : 1);
        const Batch batch{steps, rows, decode};
        std::vector<float> x(x0.begin(), x0.begin() + rows * hidden);
        backend->project_output(reference.weights, 0, batch, attention.data(), x.data(),
                                *workspace);
        expect_close(x, {output.begin(), output.begin() + rows * hidden}, tolerance.nmse,
                     tolerance.largest, "output, " + what);
        poison(*workspace);

        x.assign(x0.begin(), x0.begin() + rows * hidden);
        backend->mlp(reference.weights, 0, batch, x.data(), *workspace);
        expect_close(x, {mlp.begin(), mlp.begin() + rows * hidden}, tolerance.nmse,
                     tolerance.largest, "mlp, " + what);
        poison(*workspace);

        std::vector<int32_t> chosen;
        std::vector<double> expected;
        for (int r = rows - 1; r >= 0; r -= 2) {
          chosen.push_back(r);
          expected.insert(expected.end(), logits.begin() + r * shape.vocab,
                          logits.begin() + (r + 1) * shape.vocab);
        }
        std::vector<float> got(chosen.size() * shape.vocab, kNaN);
        backend->logits(reference.weights, batch, chosen, x0.data(), got.data(), *workspace);
        expect_close(got, expected, tolerance.nmse, tolerance.largest, "logits, " + what);
        poison(*workspace);
      }
    }
  }
}

// A row's decode results are the same bits alone and in any batch, with any number of threads.
TEST_P(CpuBackendTest, DecodeDoesNotDependOnBatchOrThreads) {
  const Shape shape = kShapes[1];
  Reference reference(shape, dtype(), 1, 4);
  const int32_t rows = 13, q_dim = shape.n_heads * shape.head_dim;
  const std::vector<float> x0 = reference.random(rows * shape.hidden),
                           attention = reference.random(rows * q_dim);
  const auto run = [&](int threads, int32_t row0, int32_t n) {
    auto backend = make(reference.config, threads);
    auto workspace = backend->make_workspace();
    std::vector<Sequence> sequences;
    std::vector<SequenceStep> steps;
    std::vector<int32_t> all;
    for (int i = 0; i < n; i++) {
      sequences.emplace_back(shape, 1, dtype(), i, 1, 5 + row0 + i, true);
      steps.push_back(sequences.back().step);
      all.push_back(i);
    }
    const Batch batch{steps, n, true};
    std::vector<float> x(x0.begin() + row0 * shape.hidden, x0.begin() + (row0 + n) * shape.hidden);
    std::vector<float> q(n * q_dim), logits(n * shape.vocab);
    backend->project_qkv(reference.weights, 0, batch, x.data(), q.data(), *workspace);
    backend->project_output(reference.weights, 0, batch, &attention[row0 * q_dim], x.data(),
                            *workspace);
    backend->mlp(reference.weights, 0, batch, x.data(), *workspace);
    backend->logits(reference.weights, batch, all, x.data(), logits.data(), *workspace);
    std::vector<std::vector<float>> results(n);
    for (int i = 0; i < n; i++) {
      results[i].assign(&q[i * q_dim], &q[i * q_dim] + q_dim);
      results[i].insert(results[i].end(), &logits[i * shape.vocab],
                        &logits[i * shape.vocab] + shape.vocab);
    }
    return results;
  };
  const auto all = run(1, 0, rows);
  for (int threads : {2, 3}) EXPECT_EQ(run(threads, 0, rows), all);
  for (int i = 0; i < rows; i++) EXPECT_EQ(run(1, i, 1)[0], all[i]) << "row " << i;
}

// K and V transforms whose inverses undo them: attention comes out as without.
TEST_P(CpuBackendTest, TransformsCancel) {
  const Shape shape = kShapes[1];
  const int32_t d = shape.head_dim, rows = 21, q_dim = shape.n_heads * d;
  Reference reference(shape, dtype(), 2, 5);
  // Per layer and head: a rotation of dims by one, scaled; its inverse.
  const int64_t n_matrices = 2 * shape.n_kv_heads;
  std::vector<float> forward(n_matrices * d * d), backward(n_matrices * d * d);
  for (int64_t m = 0; m < n_matrices; m++) {
    const float scale = static_cast<float>(1 << m);
    for (int i = 0; i < d; i++) {
      forward[(m * d + i) * d + (i + 1) % d] = scale;
      backward[(m * d + (i + 1) % d) * d + i] = 1.0f / scale;
    }
  }
  KVTransform transform;
  transform.k_forward = transform.v_forward = forward.data();
  transform.k_backward = transform.v_backward = backward.data();
  auto backend = make(reference.config);
  auto workspace = backend->make_workspace();
  const std::vector<float> x = reference.random(rows * shape.hidden);
  const auto run = [&](const KVTransform& with, std::vector<float>& q) {
    Sequence sequence(shape, 2, dtype(), 0, rows, 0, false);
    sequence.step.transform = with;
    const Batch batch{{&sequence.step, 1}, rows, false};
    std::vector<float> out(rows * q_dim, kNaN);
    q.assign(rows * q_dim, kNaN);
    backend->project_qkv(reference.weights, 1, batch, x.data(), q.data(), *workspace);
    backend->attend(1, batch, q.data(), out.data(), *workspace);
    return out;
  };
  std::vector<float> q_plain, q_with;
  const std::vector<float> plain = run({}, q_plain), with = run(transform, q_with);
  const Tolerance tolerance = tolerance_of(dtype(), true);
  expect_close(with, {plain.begin(), plain.end()}, tolerance.nmse, tolerance.largest, "attention");
  // q' = q B^T: element j is q[j - 1] / scale, by layer 1's matrices 2 and 3.
  for (int h = 0; h < shape.n_heads; h++) {
    const float scale = h < shape.n_heads / 2 ? 4.0f : 8.0f;
    for (int j = 0; j < d; j++) {
      EXPECT_FLOAT_EQ(q_with[h * d + (j + 1) % d], q_plain[h * d + j] / scale);
    }
  }
}

// Prefill attention over a store of real slots, a dense run and the call's own tokens.
TEST_P(CpuBackendTest, PrefillAttention) {
  struct Case {
    int32_t n_heads, n_kv_heads, head_dim, n_blocks, dense, before, rows;
    int32_t window = 0, sinks = 0, dropped = 0;  // blocks
  };
  constexpr Case kCases[] = {
      {4, 4, 8, 0, 0, 0, 1},
      {4, 4, 16, 0, 0, 0, 70},
      {4, 2, 64, 0, 5, 0, 33},
      {8, 2, 64, 1, 37, 0, 7},
      {4, 1, 80, 2, 32, 3, 50},
      {8, 1, 128, 5, 33, 260, 40},
      {2, 1, 128, 0, 0, 600, 90},
      {6, 6, 16, 3, 95, 0, 2},
      // Windows: in the call alone, into the dense buffer, into sinks, into the store, one token.
      {4, 2, 64, 2, 37, 260, 70, 100},
      {4, 4, 16, 2, 37, 0, 70, 90, 5},
      {2, 1, 64, 1, 37, 0, 33, 100, 5},
      {2, 1, 80, 9, 37, 3, 50, 200, 5, 4},
      {8, 2, 64, 9, 300, 3, 50, 330, 270, 2},
      {4, 2, 64, 2, 5, 0, 90, 1},
      {4, 2, 64, 6, 5, 0, 600, 300, 2, 1},
  };
  for (const Case& c : kCases) {
    const int32_t d = c.head_dim, n_layers = 2, layer = 1, q_dim = c.n_heads * d;
    const Shape shape{16, 16, c.n_heads, c.n_kv_heads, d, 8, false};
    Reference reference(shape, dtype(), n_layers, 6);
    auto backend = make(reference.config);
    auto workspace = backend->make_workspace();
    const SlotLayout k_slot = make_slot_layout(d, true, 0.5, true, dtype());
    const SlotLayout v_slot = make_slot_layout(d, false, 0.5, true, dtype());
    const StoreLayout layout = make_store_layout(n_layers, c.n_kv_heads, k_slot, v_slot);
    std::vector<std::vector<uint8_t>> pages(c.n_blocks);
    std::vector<const uint8_t*> page_pointers;
    for (auto& page : pages) {
      page.assign(layout.page_bytes + kSlabSlack, 0);
      for (int32_t head = 0; head < c.n_kv_heads; head++) {
        for (bool value : {false, true}) {
          const SlotLayout& slot = value ? v_slot : k_slot;
          const std::vector<float> x = reference.random(64 * d);
          std::vector<uint32_t> masks(64 * slot.mask_words, 0);
          for (int row = 0; row < 64; row++) {
            for (int i = 0; i < d; i++) {  // the first `keep` of every group, shifted by the row
              if ((i + row) % slot.group < slot.keep)
                masks[row * slot.mask_words + i / 32] |= 1u << i % 32;
            }
          }
          pack_block(slot, x.data(), masks.data(),
                     page.data() + (value ? v_slot_offset(layout, layer, head)
                                          : k_slot_offset(layout, layer, head)));
        }
      }
      page_pointers.push_back(page.data());
    }
    SequenceStep step;
    step.n_rows = c.rows;
    step.layout = &layout;
    step.pages = page_pointers.data();
    step.n_blocks = c.n_blocks;
    step.dense_capacity = c.dense + 3;
    step.dense_tokens = c.dense;
    step.n_sinks = c.sinks;
    step.dropped_blocks = c.dropped;
    const int32_t windows[] = {0, c.window};
    if (c.window > 0) step.windows = windows;
    step.fresh_pos0 = 64 * (c.dropped + c.n_blocks) + c.dense;
    step.pos0 = step.fresh_pos0 + c.before;
    step.fresh_capacity = c.before + c.rows + 5;
    const auto buffer = [&](int64_t blocks, int64_t capacity, int64_t valid) {
      std::vector<uint8_t> bytes(dtype_bytes(dtype(), blocks * capacity * d), 0xff);
      const std::vector<float> x = reference.random(blocks * capacity * d);
      for (int64_t b = 0; b < blocks; b++) {
        for (int64_t i = 0; i < valid * d; i++) {
          store_float(bytes.data(), dtype(), b * capacity * d + i, x[b * capacity * d + i]);
        }
      }
      return bytes;  // NaN beyond what is valid
    };
    std::vector<uint8_t> dense = buffer(n_layers * 2 * c.n_kv_heads, step.dense_capacity, c.dense);
    std::vector<uint8_t> fresh = buffer(2 * c.n_kv_heads, step.fresh_capacity, c.before + c.rows);
    step.dense = dense.data();
    step.fresh = fresh.data();
    const std::vector<float> q = reference.random(c.rows * q_dim);

    std::vector<double> expected(c.rows * q_dim);
    for (int32_t h = 0; h < c.n_heads; h++) {
      const int32_t kv = h / (c.n_heads / c.n_kv_heads);
      std::vector<std::vector<float>> keys, values;
      std::vector<float> k_rows(64 * d), v_rows(64 * d);
      for (const uint8_t* page : page_pointers) {
        unpack_slot(k_slot, page + k_slot_offset(layout, layer, kv), k_rows.data());
        unpack_slot(v_slot, page + v_slot_offset(layout, layer, kv), v_rows.data());
        for (int t = 0; t < 64; t++) {
          keys.emplace_back(&k_rows[t * d], &k_rows[t * d] + d);
          values.emplace_back(&v_rows[t * d], &v_rows[t * d] + d);
        }
      }
      const auto take = [&](const std::vector<uint8_t>& bytes, int64_t block, int64_t capacity,
                            int64_t t, std::vector<std::vector<float>>& rows) {
        std::vector<float> row(d);
        for (int i = 0; i < d; i++)
          row[i] = load_float(bytes.data(), dtype(), (block * capacity + t) * d + i);
        rows.push_back(row);
      };
      for (int t = 0; t < c.dense; t++) {
        take(dense, (layer * 2 + 0) * c.n_kv_heads + kv, step.dense_capacity, t, keys);
        take(dense, (layer * 2 + 1) * c.n_kv_heads + kv, step.dense_capacity, t, values);
      }
      for (int t = 0; t < c.before + c.rows; t++) {
        take(fresh, kv, step.fresh_capacity, t, keys);
        take(fresh, c.n_kv_heads + kv, step.fresh_capacity, t, values);
      }
      for (int32_t r = 0; r < c.rows; r++) {
        const size_t visible = step.pos0 - 64 * c.dropped + r + 1;
        const auto sees = [&](size_t row) {
          int32_t position = static_cast<int32_t>(row) + 64 * c.dropped;
          if (position < c.sinks + 64 * (c.dropped + c.n_blocks)) {  // the store, then the sinks
            const int32_t in_dense = static_cast<int32_t>(row) - 64 * c.n_blocks;
            position = in_dense < 0 ? position + c.sinks : in_dense;
          }
          return c.window == 0 || position > step.pos0 + r - c.window;
        };
        std::vector<double> p(visible);
        double top = -1e300, sum = 0;
        for (size_t t = 0; t < visible; t++) {
          double s = 0;
          for (int i = 0; i < d; i++) s += double{q[r * q_dim + h * d + i]} * keys[t][i];
          p[t] = s / std::sqrt(static_cast<double>(d));
          if (!sees(t)) p[t] = -INFINITY;
          top = std::max(top, p[t]);
        }
        for (double& v : p) sum += v = std::exp(v - top);
        for (size_t t = 0; t < visible; t++) {
          for (int i = 0; i < d; i++) expected[r * q_dim + h * d + i] += p[t] / sum * values[t][i];
        }
      }
    }
    const Tolerance tolerance = tolerance_of(dtype(), true);
    std::vector<float> first;
    for (int threads : {1, 3}) {
      backend = make(reference.config, threads);
      const Batch batch{{&step, 1}, c.rows, false};
      std::vector<float> out(c.rows * q_dim, kNaN);
      backend->attend(layer, batch, q.data(), out.data(), *workspace);
      const std::string what = "attention, head_dim " + std::to_string(d) + ", " +
                               std::to_string(c.rows) + " rows, " + std::to_string(c.n_heads) +
                               "/" + std::to_string(c.n_kv_heads) + " heads";
      expect_close(out, expected, tolerance.nmse, tolerance.largest, what);
      if (first.empty()) first = out;
      EXPECT_EQ(first, out) << what << ": depends on threads";
      poison(*workspace);
    }
  }
}

TEST(CpuBackendFactory, RefusesWhatItCannotDo) {
  ModelConfig config;
  config.n_heads = config.n_kv_heads = 1;
  config.head_dim = 8;
  EXPECT_EQ(make_backend(config, {})->device(), "cpu");
  EXPECT_THROW(make_backend(config, {.device = "tpu"}), std::invalid_argument);
  EXPECT_THROW(make_backend(config, {.dtype = DType::kInt8}), std::invalid_argument);
  EXPECT_THROW(make_backend(config, {.threads = -1}), std::invalid_argument);
}

TEST(CpuBackendFactory, HugeAllocationIsOutOfMemory) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer's allocator ends the program instead of returning null";
#endif
  ModelConfig config;
  config.n_heads = config.n_kv_heads = 1;
  config.head_dim = 8;
  auto backend = make_backend(config, {.device = "cpu"});
  EXPECT_GT(backend->available_bytes(), 0);
  EXPECT_THROW(backend->allocate(int64_t{1} << 60), OutOfMemory);
}

}  // namespace
}  // namespace mustafar
