// The merge of a row's splits, and the value transform undone, against double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/elementwise.h"
#include "linear_fixture.h"

namespace mustafar::cuda {
namespace {

constexpr int32_t kKVHeads = 2, kLayers = 2, kLayer = 1;

// Every head and sequence (one row each) has splits with random maxima, of which some saw no token.
// Values have a matrix of the value transform, or dims that were dealt to groups, or neither.
// after: the matrix is left to undo_value_transform.
void check_combine(int32_t head_dim, const std::vector<int32_t>& n_blocks, int32_t groups,
                   bool matrix, bool after = false, int32_t n_heads = 4) {
  SCOPED_TRACE(std::to_string(head_dim) + (matrix ? " by a matrix" : "") + (after ? " after" : ""));
  const int32_t n_rows = static_cast<int32_t>(n_blocks.size());
  const int64_t matrix_size = int64_t{head_dim} * head_dim;
  Values backward(kLayers * kKVHeads * matrix_size, DType::kF32, 1);
  std::vector<SequenceView> sequences(n_rows);
  AttentionArgs args;
  for (int32_t row = 0; row < n_rows; row++) {
    SequenceView& s = sequences[row];
    s.row0 = row;
    s.n_rows = 1;
    s.n_blocks = n_blocks[row];
    s.dense_tokens = 10 + row;
    s.transform.v_groups = groups;
    if (matrix) s.transform.v_backward = backward.floats();
    args.max_splits = std::max(args.max_splits, seen_tokens(s, 0).n_splits());
  }
  const DeviceArray<SequenceView> views(sequences);
  const int64_t stride = head_dim + 2;
  DeviceArray<float> partials(int64_t{n_rows} * n_heads * args.max_splits * stride);
  const auto partial_of = [&](int32_t row, int32_t head, int32_t split) {
    return partials.host() + ((int64_t{row} * n_heads + head) * args.max_splits + split) * stride;
  };
  std::mt19937 random(3);
  for (int32_t row = 0; row < n_rows; row++) {
    const int32_t n_splits = seen_tokens(sequences[row], 0).n_splits();
    for (int32_t head = 0; head < n_heads; head++) {
      for (int32_t split = 0; split < n_splits; split++) {
        float* partial = partial_of(row, head, split);
        const bool empty = n_splits > 1 && split % 5 == 3;
        for (int32_t d = 0; d < head_dim; d++) {
          partial[d] = empty ? 0.0f : testing::random_normal(random);
        }
        partial[head_dim] = empty ? -INFINITY : 4.0f * testing::random_normal(random);
        partial[head_dim + 1] = empty ? 0.0f : 1.0f + static_cast<float>(random() % 100);
      }
    }
  }
  partials.upload();
  DeviceArray<float> out(int64_t{n_rows} * n_heads * head_dim, "the output");
  args.sequences = views.device();
  args.n_sequences = args.n_rows = n_rows;
  args.layer = kLayer;
  args.n_heads = n_heads;
  args.n_kv_heads = kKVHeads;
  args.head_dim = head_dim;
  args.partials = partials.device();
  args.out = out.device();
  args.undoes_values = !after;
  combine_attention(args, nullptr);
  if (after) undo_value_transform(args, nullptr);
  out.download();

  for (int32_t row = 0; row < n_rows; row++) {
    const int32_t n_splits = seen_tokens(sequences[row], 0).n_splits();
    for (int32_t head = 0; head < n_heads; head++) {
      double max = -INFINITY, sum = 0;
      for (int32_t split = 0; split < n_splits; split++) {
        max = std::max(max, double{partial_of(row, head, split)[head_dim]});
      }
      std::vector<double> merged(head_dim);
      for (int32_t split = 0; split < n_splits; split++) {
        const float* partial = partial_of(row, head, split);
        const double weight = std::exp2(partial[head_dim] - max);
        sum += weight * partial[head_dim + 1];
        for (int32_t d = 0; d < head_dim; d++) merged[d] += weight * partial[d];
      }
      for (int32_t d = 0; d < head_dim; d++) {
        double want = merged[stored_index(d, groups, head_dim)] / sum, size = 1;
        if (matrix) {
          want = 0;
          const int64_t first = (kLayer * kKVHeads + head / (n_heads / kKVHeads)) * matrix_size;
          for (int32_t j = 0; j < head_dim; j++) {
            want += merged[j] / sum * backward[first + int64_t{j} * head_dim + d];
            size += std::fabs(merged[j] / sum * backward[first + int64_t{j} * head_dim + d]);
          }
        }
        ASSERT_NEAR(out.host()[(row * n_heads + head) * head_dim + d], want,
                    (after ? 0x1p-16 : 2e-6) * size)
            << "row " << row << " head " << head << " dim " << d << " of " << n_splits << " splits";
      }
    }
  }
}

TEST(Combine, MergesTheSplitsOfEveryRow) {
  for (const int32_t head_dim : {8, 64, 80, 128, 256}) {
    check_combine(head_dim, {0, 3, 31, 130, 9000}, 1, false);
    check_combine(head_dim, {600, 2}, head_dim / 4, false);
  }
}

TEST(Combine, TakesSeveralHeadsOfManyRowsAtOnce) {
  std::vector<int32_t> n_blocks(130, 2);
  n_blocks[1] = 130;
  n_blocks[129] = 31;
  for (const bool matrix : {false, true}) check_combine(64, n_blocks, 4, matrix, false, 8);
}

TEST(Combine, UndoesTheValueTransform) {
  for (const int32_t head_dim : {24, 64, 128}) check_combine(head_dim, {70, 0}, 1, true);
}

TEST(Combine, LeavesTheValueTransformToAKernelOfManyRows) {
  // Groups are of no effect beside a matrix.
  for (const int32_t head_dim : {64, 96, 128}) check_combine(head_dim, {70, 0, 5}, 8, true, true);
}

}  // namespace
}  // namespace mustafar::cuda
