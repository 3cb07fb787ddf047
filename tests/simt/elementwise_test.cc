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
  for (const int64_t hidden : {300, 64, 4096}) {
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
  Values gate(3000, kF32, 3, 3.0f), up(3000, kF32, 4);
  const Values before(3000, kF32, 3, 3.0f);
  silu_multiply(gate.floats(), up.floats(), 3000, nullptr);
  gate.download();
  for (int i = 0; i < 3000; i++) {
    const double want = before[i] / (1 + std::exp(-double{before[i]})) * up[i];
    ASSERT_NEAR(gate[i], want, 1e-5 * std::max(1.0, std::fabs(want)));
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
  static constexpr int32_t kCapacity = 39;

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
  const int32_t most = c.prefill ? 35 : 1;  // more than a block takes
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
  args.max_row_count = most;
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
          ASSERT_NEAR(q[at + d], want.values[d], 2e-6 * want.sizes[d])
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
                        2e-6 * want.sizes[d] + rounding * std::fabs(want.values[d]))
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
                                           RopeCase{kF16, 256, Order::kGroups, false}),
                         name_of_rope);

TEST(Elementwise, ValueTransformUndoneOfAPrompt) {
  constexpr int32_t kDims = 64;
  std::vector<SequenceView> sequences(3);
  for (int i = 0, rows[] = {40, 3, 33}, at = 0; i < 3; at += rows[i++]) {
    sequences[i].row0 = at;
    sequences[i].n_rows = rows[i];
  }
  Values matrix(kLayers * kKVHeads * kDims * kDims, kF32, 1, 0.1f);
  sequences[0].transform.v_backward = sequences[2].transform.v_backward = matrix.floats();
  Values out(76 * kHeads * kDims, kF32, 2);
  const Values before(76 * kHeads * kDims, kF32, 2);
  const DeviceArray<SequenceView> views(sequences);
  AttentionArgs args;
  args.sequences = views.device();
  args.n_sequences = 3;
  args.n_rows = 76;
  args.max_row_count = 40;
  args.layer = kLayer;
  args.n_heads = kHeads;
  args.n_kv_heads = kKVHeads;
  args.head_dim = kDims;
  args.out = out.floats();
  ASSERT_TRUE(undo_value_transform(args, nullptr));
  out.download();
  for (int64_t row = 0; row < 76; row++) {
    const bool undone = row < 40 || row >= 43;
    for (int32_t head = 0; head < kHeads; head++) {
      const int64_t at = (row * kHeads + head) * kDims;
      const int64_t m = (kLayer * kKVHeads + head / (kHeads / kKVHeads)) * int64_t{kDims} * kDims;
      for (int32_t d = 0; d < kDims; d++) {
        double want = undone ? 0.0 : before[at + d];
        for (int32_t j = 0; undone && j < kDims; j++) {
          want += double{before[at + j]} * matrix[m + j * kDims + d];
        }
        ASSERT_NEAR(out[at + d], want, undone ? 1e-5 : 0.0) << "row " << row << ", dim " << d;
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
