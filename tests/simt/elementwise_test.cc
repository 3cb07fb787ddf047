// The small operations between the matrix products against plain references.
#include "cuda/elementwise.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "linear_fixture.h"

namespace mustafar::cuda {
namespace {

constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16;

TEST(Elementwise, RmsNormOfChosenRows) {
  for (const int64_t hidden : {300, 64, 65, 4096}) {
    if (hidden == 4096 && !kOnDevice) continue;
    Values x(5 * hidden, kF32, 1), weight(hidden, kF32, 2);
    DeviceArray<float> out(2 * hidden);
    const std::vector<int32_t> rows = {4, 1};
    const DeviceArray<int32_t> rows_copy(rows);
    for (const bool chosen : {true, false}) {
      out.poison();
      rms_norm(x.floats(), chosen ? rows_copy.device() : nullptr, weight.floats(), 1e-5f, 2, hidden,
               out.device(), nullptr);
      out.download();
      for (int i = 0; i < 2; i++) {
        const int64_t from = (chosen ? rows[i] : i) * hidden;
        double squares = 0;
        for (int64_t j = 0; j < hidden; j++) squares += double{x[from + j]} * x[from + j];
        for (int64_t j = 0; j < hidden; j++) {
          const double want = x[from + j] / std::sqrt(squares / hidden + 1e-5) * weight[j];
          ASSERT_NEAR(out.host()[i * hidden + j], want, 1e-5 * std::max(1.0, std::fabs(want)));
        }
      }
    }
  }
}

TEST(Elementwise, RmsNormRounded) {
  constexpr int64_t kHidden = 1100;
  Values x(3 * kHidden, kF32, 1), weight(kHidden, kF32, 2);
  DeviceArray<float> exact(3 * kHidden);
  rms_norm(x.floats(), nullptr, weight.floats(), 1e-5f, 3, kHidden, exact.device(), nullptr);
  exact.download();
  for (const DType dtype : {kF16, kBF16}) {
    DeviceMemory out(dtype_bytes(dtype, 3 * kHidden), "the rounded rows");
    rms_norm_rounded(x.floats(), weight.floats(), 1e-5f, 3, kHidden, dtype, out.device(), nullptr);
    out.download();
    for (int64_t i = 0; i < 3 * kHidden; i++) {
      ASSERT_EQ(load_float(out.host(), dtype, i), testing::rounded(exact.host()[i], dtype)) << i;
    }
  }
}

TEST(Elementwise, Embed) {
  for (const DType dtype : {kF32, kF16, kBF16}) {
    Values table(7 * 50, dtype, 1);
    DeviceArray<float> out(2 * 50);
    const std::vector<int32_t> ids = {6, 2};
    const DeviceArray<int32_t> ids_copy(ids);
    embed(table.device(), dtype, ids_copy.device(), 2, 50, out.device(), nullptr);
    out.download();
    for (int i = 0; i < 100; i++) ASSERT_EQ(out.host()[i], table[ids[i / 50] * 50 + i % 50]);
  }
}

TEST(Elementwise, Silu) {
  constexpr int kCount = 3003;  // not whole fours
  Values gate(kCount, kF32, 3, 3.0f), up(kCount, kF32, 4);
  const Values before(kCount, kF32, 3, 3.0f);
  DeviceMemory rounded(dtype_bytes(kBF16, kCount), "products in bf16");
  silu_multiply(gate.floats(), up.floats(), kCount, kBF16, rounded.device(), nullptr);
  rounded.download();
  silu_multiply(gate.floats(), up.floats(), kCount, kF32, gate.floats(), nullptr);
  gate.download();
  for (int i = 0; i < kCount; i++) {
    const double want = before[i] / (1 + std::exp(-double{before[i]})) * up[i];
    ASSERT_NEAR(gate[i], want, 1e-5 * std::max(1.0, std::fabs(want)));
    ASSERT_EQ(load_float(rounded.host(), kBF16, i), testing::rounded(gate[i], kBF16)) << i;
  }
}

enum class Order { kPlain, kGroups, kMatrix };

struct RopeCase {
  DType tail;
  int32_t head_dim;
  Order order;
  bool prefill;
};

constexpr int32_t kLayers = 2, kLayer = 1, kHeads = 6, kKVHeads = 2;

// A sequence of the batch: one row into the dense buffer, or several into the fresh one.
struct RopeRows {
  RopeRows(const RopeCase& c, int32_t row0, int32_t n_rows, int32_t pos0)
      : cache(dtype_bytes(c.tail,
                          int64_t{c.prefill ? 1 : kLayers} * 2 * kKVHeads * kCapacity * c.head_dim),
              c.prefill ? "the fresh tokens" : "the dense buffer") {
    view.row0 = row0;
    view.n_rows = n_rows;
    view.pos0 = pos0;
    if (c.prefill) {
      view.fresh = cache.device();
      view.fresh_capacity = kCapacity;
      view.fresh_pos0 = pos0 - 2;
    } else {
      view.dense = cache.device();
      view.dense_capacity = kCapacity;
      view.dense_tokens = 4;
    }
    view.transform.k_groups = c.order == Order::kGroups ? 4 : 1;
    view.transform.v_groups = c.order == Order::kGroups ? c.head_dim / 16 : 1;
  }
  static constexpr int32_t kCapacity = 144;

  // Index of value d of row r's key (kind 0) or value in the cache.
  int64_t at(const RopeCase& c, int32_t r, int32_t kind, int32_t head, int32_t d) const {
    const int64_t plane =
        c.prefill ? kind * kKVHeads + head : (kLayer * 2 + kind) * kKVHeads + head;
    return (plane * kCapacity + (c.prefill ? r + 2 : view.dense_tokens)) * c.head_dim + d;
  }

  SequenceView view;
  DeviceMemory cache;
};

class RopeAppendTest : public ::testing::TestWithParam<RopeCase> {};

TEST_P(RopeAppendTest, RotatesTransformsAndAppends) {
  const RopeCase& c = GetParam();
  const int32_t dims = c.head_dim, half = dims / 2;
  const int32_t most = c.prefill ? 140 : 1;  // more than two blocks take
  RopeRows a(c, 0, most, 20), b(c, most, c.prefill ? 2 : 1, 130000);
  const int32_t n_rows = b.view.row0 + b.view.n_rows;
  const int64_t matrix_size = int64_t{dims} * dims;
  Values k_forward(kLayers * kKVHeads * matrix_size, kF32, 1, 0.1f);
  Values k_backward(kLayers * kKVHeads * matrix_size, kF32, 2, 0.1f);
  Values v_forward(kLayers * kKVHeads * matrix_size, kF32, 3, 0.1f);
  if (c.order == Order::kMatrix) {
    for (RopeRows* s : {&a, &b}) {
      s->view.transform.k_forward = k_forward.floats();
      s->view.transform.k_backward = k_backward.floats();
      s->view.transform.v_forward = v_forward.floats();
      s->view.transform.k_groups = s->view.transform.v_groups = 8;  // of no effect beside a matrix
    }
  }
  Values q(int64_t{n_rows} * kHeads * dims, kF32, 4), k(int64_t{n_rows} * kKVHeads * dims, kF32, 5);
  Values v(int64_t{n_rows} * kKVHeads * dims, kF32, 6);
  const Values q_before(int64_t{n_rows} * kHeads * dims, kF32, 4);
  std::vector<float> frequencies(half);
  for (int i = 0; i < half; i++) frequencies[i] = std::pow(10000.0f, -2.0f * i / dims);
  const DeviceArray<float> frequencies_copy(frequencies);
  const DeviceArray<SequenceView> views(std::vector<SequenceView>{a.view, b.view});
  RopeArgs args;
  args.sequences = views.device();
  args.n_sequences = 2;
  args.n_rows = n_rows;
  args.layer = kLayer;
  args.n_heads = kHeads;
  args.n_kv_heads = kKVHeads;
  args.head_dim = dims;
  args.tail_dtype = c.tail;
  args.rope_dims = dims;
  args.frequencies = frequencies_copy.device();
  args.q = q.floats();
  args.k = k.floats();
  args.v = v.floats();
  rope_append(args, nullptr);
  q.download();
  a.cache.download();
  b.cache.download();

  // A head's vector as it should be stored, in f64, and what its sums weigh.
  struct Row {
    std::vector<double> values, sizes;
  };
  const auto expected = [&](const Values& from, int64_t at, int32_t position, bool rotate,
                            const Values* matrix, bool transposed, int32_t kv_head,
                            int32_t groups) {
    std::vector<double> x(dims);
    for (int d = 0; d < dims; d++) x[d] = from[at + d];
    if (rotate) {
      for (int i = 0; i < half; i++) {
        const double angle = static_cast<float>(position) * frequencies[i];
        const double p = from[at + i], r = from[at + i + half];
        x[i] = p * std::cos(angle) - r * std::sin(angle);
        x[i + half] = r * std::cos(angle) + p * std::sin(angle);
      }
    }
    Row row{std::vector<double>(dims), std::vector<double>(dims, 1.0)};
    for (int d = 0; d < dims; d++) {
      if (matrix == nullptr) {
        row.values[stored_index(d, groups, dims)] = x[d];
        continue;
      }
      const int64_t first = (int64_t{kLayer} * kKVHeads + kv_head) * matrix_size;
      for (int j = 0; j < dims; j++) {
        const double term =
            x[j] * (*matrix)[first + (transposed ? d * dims + j : int64_t{j} * dims + d)];
        row.values[d] += term;
        row.sizes[d] += std::fabs(term);
      }
    }
    return row;
  };
  const bool has_matrix = c.order == Order::kMatrix;
  // Many rows are multiplied as two bf16 terms.
  const double of_term = c.tail != kF32 && n_rows > kFewRows && has_matrix ? 0x1p-16 : 2e-6;
  const double rounding = c.tail == kF32 ? 0 : c.tail == kF16 ? 0x1p-11 : 0x1p-8;
  for (RopeRows* s : {&a, &b}) {
    std::vector<bool> written(s->cache.bytes());
    for (int32_t r = 0; r < s->view.n_rows; r++) {
      const int32_t row = s->view.row0 + r, position = s->view.pos0 + r;
      for (int32_t head = 0; head < kHeads; head++) {
        const int64_t at = (int64_t{row} * kHeads + head) * dims;
        const Row want = expected(q_before, at, position, true, has_matrix ? &k_backward : nullptr,
                                  true, head / (kHeads / kKVHeads), s->view.transform.k_groups);
        for (int d = 0; d < dims; d++) {
          ASSERT_NEAR(q[at + d], want.values[d], of_term * want.sizes[d])
              << "q, row " << row << " head " << head << " dim " << d;
        }
      }
      for (int32_t kind = 0; kind < 2; kind++) {
        for (int32_t head = 0; head < kKVHeads; head++) {
          const Values* matrix = !has_matrix ? nullptr : kind == 0 ? &k_forward : &v_forward;
          const Row want =
              expected(kind == 0 ? k : v, (int64_t{row} * kKVHeads + head) * dims, position,
                       kind == 0, matrix, false, head,
                       kind == 0 ? s->view.transform.k_groups : s->view.transform.v_groups);
          for (int d = 0; d < dims; d++) {
            const int64_t at = s->at(c, r, kind, head, d);
            ASSERT_NEAR(load_float(s->cache.host(), c.tail, at), want.values[d],
                        of_term * want.sizes[d] + rounding * std::fabs(want.values[d]))
                << (kind == 0 ? "k" : "v") << ", row " << row << " head " << head << " dim " << d;
            const int64_t bytes = dtype_bytes(c.tail, 1);
            for (int64_t i = 0; i < bytes; i++) written[at * bytes + i] = true;
          }
        }
      }
    }
    for (size_t i = 0; i < written.size(); i++) {
      ASSERT_TRUE(written[i] || s->cache.host()[i] == 0xff) << "byte " << i << " was written";
    }
  }
}

std::string name_of_rope(const ::testing::TestParamInfo<RopeCase>& info) {
  const RopeCase& c = info.param;
  const char* const orders[] = {"plain", "groups", "matrix"};
  return std::string(dtype_name(c.tail)) + "_" + std::to_string(c.head_dim) + "_" +
         orders[static_cast<int>(c.order)] + (c.prefill ? "_prefill" : "_decode");
}

INSTANTIATE_TEST_SUITE_P(Rows, RopeAppendTest,
                         ::testing::Values(RopeCase{kF32, 16, Order::kPlain, false},
                                           RopeCase{kF32, 16, Order::kMatrix, true},
                                           RopeCase{kF16, 64, Order::kGroups, false},
                                           RopeCase{kBF16, 64, Order::kMatrix, true},
                                           RopeCase{kBF16, 80, Order::kGroups, true},
                                           RopeCase{kF16, 128, Order::kGroups, true},
                                           RopeCase{kBF16, 128, Order::kPlain, false},
                                           RopeCase{kBF16, 128, Order::kMatrix, false},
                                           RopeCase{kF16, 128, Order::kMatrix, true},
                                           RopeCase{kF16, 96, Order::kMatrix, true},
                                           RopeCase{kF16, 256, Order::kGroups, false}),
                         name_of_rope);

// Rows of a decode step that stand together in a block, with three transforms or none, against each
// of them alone.
TEST(Elementwise, RopeOfManySequencesEqualsThatOfEach) {
  constexpr int32_t kDims = 64, kSequences = 67, kCapacity = 3;
  const RopeCase c{kBF16, kDims, Order::kMatrix, false};
  constexpr int64_t kMatrices = int64_t{kLayers} * kKVHeads * kDims * kDims;
  constexpr int64_t kCacheValues = int64_t{kLayers} * 2 * kKVHeads * kCapacity * kDims;
  Values a(kMatrices, kF32, 1, 0.1f), b(kMatrices, kF32, 2, 0.1f);
  std::vector<float> frequencies(kDims / 2);
  for (int i = 0; i < kDims / 2; i++) frequencies[i] = std::pow(10000.0f, -2.0f * i / kDims);
  const DeviceArray<float> frequencies_copy(frequencies);
  Values k(int64_t{kSequences} * kKVHeads * kDims, kF32, 5);
  Values v(int64_t{kSequences} * kKVHeads * kDims, kF32, 6);
  const auto run = [&](int32_t at_once, Values& q, DeviceMemory& cache) {
    std::vector<SequenceView> sequences(kSequences);
    for (int32_t i = 0; i < kSequences; i++) {
      SequenceView& s = sequences[i];
      s.row0 = i % at_once;
      s.n_rows = 1;
      s.pos0 = 1000 * i;
      s.dense = cache.device() + dtype_bytes(c.tail, i * kCacheValues);
      s.dense_capacity = kCapacity;
      s.dense_tokens = i % kCapacity;
      s.transform.k_groups = 4;
      if (i % 7 == 3) continue;  // has none
      Values& matrices = i % 5 == 2 ? b : a;
      s.transform.k_forward = s.transform.k_backward = matrices.floats();
      if (i % 2 == 0) s.transform.v_forward = matrices.floats();
    }
    for (int32_t first = 0; first < kSequences; first += at_once) {
      const int32_t n = std::min(at_once, kSequences - first);
      const DeviceArray<SequenceView> views(
          std::vector<SequenceView>(&sequences[first], &sequences[first] + n));
      RopeArgs args;
      args.sequences = views.device();
      args.n_sequences = args.n_rows = n;
      args.layer = kLayer;
      args.n_heads = kHeads;
      args.n_kv_heads = kKVHeads;
      args.head_dim = args.rope_dims = kDims;
      args.tail_dtype = c.tail;
      args.frequencies = frequencies_copy.device();
      args.q = q.floats() + int64_t{first} * kHeads * kDims;
      args.k = k.floats() + int64_t{first} * kKVHeads * kDims;
      args.v = v.floats() + int64_t{first} * kKVHeads * kDims;
      rope_append(args, nullptr);
    }
    q.download();
    cache.download();
  };
  const int64_t bytes = dtype_bytes(c.tail, kSequences * kCacheValues);
  Values alone(int64_t{kSequences} * kHeads * kDims, kF32, 4);
  Values together(int64_t{kSequences} * kHeads * kDims, kF32, 4);
  DeviceMemory cache_alone(bytes, "dense buffers"), cache_together(bytes, "dense buffers");
  run(1, alone, cache_alone);
  run(kSequences, together, cache_together);
  for (int64_t i = 0; i < int64_t{kSequences} * kHeads * kDims; i++) {
    ASSERT_NEAR(together[i], alone[i], 2e-5) << i;
  }
  int64_t written = 0;
  for (int64_t i = 0; i < kSequences * kCacheValues; i++) {
    const float want = load_float(cache_alone.host(), c.tail, i);
    const float got = load_float(cache_together.host(), c.tail, i);
    ASSERT_EQ(std::isnan(got), std::isnan(want)) << i;
    if (std::isnan(want)) continue;  // not written
    ASSERT_NEAR(got, want, 2e-5 + 0x1p-7 * std::fabs(want)) << i;
    written++;
  }
  EXPECT_EQ(written, int64_t{kSequences} * 2 * kKVHeads * kDims);
}

TEST(Elementwise, ValueTransformUndoneOfAPrompt) {
  constexpr int32_t kDims = 64;
  std::vector<SequenceView> sequences(3);
  for (int i = 0, rows[] = {90, 3, 53}, at = 0; i < 3; at += rows[i++]) {
    sequences[i].row0 = at;
    sequences[i].n_rows = rows[i];
  }
  Values matrix(kLayers * kKVHeads * kDims * kDims, kF32, 1, 0.1f);
  sequences[0].transform.v_backward = sequences[2].transform.v_backward = matrix.floats();
  Values out(146 * kHeads * kDims, kF32, 2);
  const Values before(146 * kHeads * kDims, kF32, 2);
  const DeviceArray<SequenceView> views(sequences);
  AttentionArgs args;
  args.sequences = views.device();
  args.n_sequences = 3;
  args.n_rows = 146;
  args.max_row_count = 90;
  args.layer = kLayer;
  args.n_heads = kHeads;
  args.n_kv_heads = kKVHeads;
  args.head_dim = kDims;
  args.out = out.floats();
  undo_value_transform(args, nullptr);
  out.download();
  for (int64_t row = 0; row < 146; row++) {
    const bool undone = row < 90 || row >= 93;
    for (int32_t head = 0; head < kHeads; head++) {
      const int64_t at = (row * kHeads + head) * kDims;
      const int64_t m = (kLayer * kKVHeads + head / (kHeads / kKVHeads)) * int64_t{kDims} * kDims;
      for (int32_t d = 0; d < kDims; d++) {
        double want = undone ? 0.0 : before[at + d], size = 0;
        for (int32_t j = 0; undone && j < kDims; j++) {
          const double term = double{before[at + j]} * matrix[m + j * kDims + d];
          want += term;
          size += std::fabs(term);
        }
        ASSERT_NEAR(out[at + d], want, 0x1p-16 * size) << "row " << row << ", dim " << d;
      }
    }
  }
}

TEST(QueryMagnitude, KeepsTheNewestRowsOfEverySequence) {
  constexpr int32_t kDims = 80, kWindow = 4;
  const int64_t plane = int64_t{kWindow} * kDims, all = kLayers * kKVHeads * plane;
  DeviceArray<float> first(all), second(all);
  std::vector<SequenceView> sequences(3);
  sequences[0].n_rows = 6;  // more than the window
  sequences[0].pos0 = 3;
  sequences[0].query_magnitude = first.device();
  sequences[1].row0 = 6;
  sequences[1].n_rows = 1;
  sequences[1].pos0 = 1001;
  sequences[1].query_magnitude = second.device();
  sequences[2].row0 = 7;  // keeps none
  sequences[2].n_rows = 2;
  for (SequenceView& s : sequences) s.query_window = kWindow;
  Values q(9 * kHeads * kDims, kF32, 1);
  const DeviceArray<SequenceView> views(sequences);
  AttentionArgs args;
  args.sequences = views.device();
  args.n_sequences = 3;
  args.n_rows = 9;
  args.max_row_count = 6;
  args.layer = kLayer;
  args.n_heads = kHeads;
  args.n_kv_heads = kKVHeads;
  args.head_dim = kDims;
  args.q = q.floats();
  record_query_magnitude(args, nullptr);
  first.download();
  second.download();
  const DeviceArray<float>* const kept[] = {&first, &second};
  for (int s = 0; s < 2; s++) {
    const SequenceView& view = sequences[s];
    std::vector<float> want(all, NAN);
    for (int32_t r = std::max(0, view.n_rows - kWindow); r < view.n_rows; r++) {
      for (int32_t head = 0; head < kHeads; head++) {
        const int32_t kv_head = head / (kHeads / kKVHeads);
        for (int32_t d = 0; d < kDims; d++) {
          float& sum =
              want[(kLayer * kKVHeads + kv_head) * plane + (view.pos0 + r) % kWindow * kDims + d];
          const float size = std::fabs(q[((view.row0 + r) * kHeads + head) * kDims + d]);
          sum = std::isnan(sum) ? size : sum + size;
        }
      }
    }
    for (int64_t i = 0; i < all; i++) {
      const float got = load_float(kept[s]->DeviceMemory::host(), kF32, i);
      if (std::isnan(want[i])) {
        ASSERT_TRUE(std::isnan(got)) << "sequence " << s << ", " << i << " was written";
      } else {
        ASSERT_EQ(got, want[i]) << "sequence " << s << ", " << i;
      }
    }
  }
}

}  // namespace
}  // namespace mustafar::cuda
