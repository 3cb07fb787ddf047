#include "backend/cpu/compress/commit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "format/pack.h"
#include "format/prune.h"
#include "mustafar/error.h"
#include "mustafar/kv_config.h"
#include "support/kv_test_util.h"

namespace mustafar {
namespace {

// A sequence that is fed rows and commits by the schedule; remembers every row in f32.
class Sequence {
 public:
  Sequence(const StoreLayout& layout, DType tail, int32_t sinks, int32_t window, Isa isa)
      : layout_(layout), tail_(tail), window_(window), isa_(isa) {
    head_dim_ = layout.k.head_dim;
    planes_ = layout.n_layers * 2 * layout.n_kv_heads;
    capacity_ = sinks + window + kBlockTokens;
    dense_ = HostBuffer(planes_ * capacity_ * row_bytes());
    std::memset(dense_.data(), 0xff, dense_.bytes());
    rows_.resize(planes_);
    step_.layout = &layout_;
    step_.dense = dense_.data();
    step_.dense_capacity = capacity_;
    step_.n_sinks = sinks;
  }
  Sequence(Sequence&&) = delete;

  SequenceStep& step() { return step_; }
  CommitStep& commit_step() { return commit_; }
  int32_t position() const { return position_; }
  const std::vector<HostBuffer>& pages() const { return pages_; }

  // One call of n tokens: layer by layer through the fresh buffer, as prefill, or one token into
  // the dense buffer, as decode.
  void append(int32_t n, bool decode, std::mt19937& random) {
    const int64_t dense_before = step_.dense_tokens;
    position_ += n;
    const int64_t target = compressed_tokens(position_, step_.n_sinks, window_) / kBlockTokens;
    const int32_t n_new = static_cast<int32_t>(target - static_cast<int64_t>(pages_.size()));
    std::vector<uint8_t*> new_pages;
    for (int32_t i = 0; i < n_new; i++) {
      pages_.emplace_back(layout_.page_bytes);
      std::memset(pages_.back().data(), 0xff, layout_.page_bytes);
    }
    for (int32_t i = 0; i < n_new; i++) {
      new_pages.push_back(pages_[pages_.size() - n_new + i].as<uint8_t>());
    }
    commit_.sequence = &step_;
    commit_.dense_tokens = static_cast<int32_t>(dense_before) + (decode ? 1 : 0);
    commit_.fresh_tokens = decode ? 0 : n;
    commit_.new_pages = new_pages.data();
    commit_.n_new_blocks = n_new;
    commit_.end_pos = position_;
    commit_.dense_out = dense_.data();
    const int64_t per_layer = int64_t{2} * layout_.n_kv_heads;
    if (decode) {
      for (int64_t plane = 0; plane < planes_; plane++) {
        put(random, plane, dense_.as<uint8_t>() + (plane * capacity_ + dense_before) * row_bytes());
      }
      commit(0, layout_.n_layers);
    } else {
      HostBuffer fresh(per_layer * (n + 1) * row_bytes());
      step_.fresh = fresh.data();
      step_.fresh_capacity = n + 1;
      for (int32_t layer = 0; layer < layout_.n_layers; layer++) {
        for (int64_t i = 0; i < per_layer; i++) {
          for (int32_t t = 0; t < n; t++) {
            put(random, layer * per_layer + i,
                fresh.as<uint8_t>() + (i * (n + 1) + t) * row_bytes());
          }
        }
        commit(layer, 1);
      }
      step_.fresh = nullptr;
    }
    step_.dense_tokens = static_cast<int32_t>(dense_before) + n - n_new * kBlockTokens;
  }

  // Moves the dense tokens to a buffer of another capacity.
  void grow(int64_t capacity) {
    HostBuffer grown(planes_ * capacity * row_bytes());
    std::memset(grown.data(), 0xff, grown.bytes());
    commit_ = {};
    commit_.sequence = &step_;
    commit_.dense_tokens = step_.dense_tokens;
    commit_.end_pos = position_;
    commit_.dense_out = grown.data();
    commit_.dense_out_capacity = static_cast<int32_t>(capacity);
    commit(0, layout_.n_layers);
    commit_.dense_out_capacity = 0;
    dense_ = std::move(grown);
    capacity_ = capacity;
    step_.dense = dense_.data();
    step_.dense_capacity = static_cast<int32_t>(capacity);
  }

  // Row of a position as it was produced.
  const std::vector<float>& row(int32_t layer, bool is_key, int32_t head, int32_t position) const {
    return rows_[(layer * 2 + (is_key ? 0 : 1)) * layout_.n_kv_heads + head][position];
  }

  // Sinks, then the tail, are the rows as produced.
  void expect_dense_rows() const {
    const int32_t stored = static_cast<int32_t>(pages_.size()) * kBlockTokens;
    for (int32_t plane = 0; plane < planes_; plane++) {
      for (int32_t i = 0; i < step_.dense_tokens; i++) {
        const int32_t position = i < step_.n_sinks ? i : i + stored;
        for (int32_t d = 0; d < head_dim_; d++) {
          ASSERT_EQ(
              load_float(dense_.data(), tail_, (int64_t{plane} * capacity_ + i) * head_dim_ + d),
              rows_[plane][position][d])
              << "plane " << plane << " position " << position;
        }
      }
    }
  }

 private:
  int64_t row_bytes() const { return dtype_bytes(tail_, head_dim_); }
  void put(std::mt19937& random, int64_t plane, uint8_t* out) {
    std::vector<float> row(head_dim_);
    for (int32_t d = 0; d < head_dim_; d++) {
      // Coarse numbers, so that ties are common.
      row[d] = testing::rounded(std::round(testing::random_normal(random) * 8) / 8, tail_);
      store_float(out, tail_, d, row[d]);
    }
    rows_[plane].push_back(row);
  }
  void commit(int32_t first_layer, int32_t n_layers) {
    ThreadPool pool(2);
    HostBuffer scratch;
    commit_blocks(pool, isa_, tail_, 4, {&commit_, 1}, first_layer, n_layers, scratch);
  }

  StoreLayout layout_;
  DType tail_;
  int32_t window_;
  Isa isa_;
  int32_t head_dim_ = 0;
  int64_t planes_ = 0, capacity_ = 0;
  int32_t position_ = 0;
  HostBuffer dense_;
  std::vector<HostBuffer> pages_;
  std::vector<std::vector<std::vector<float>>> rows_;  // [plane][position][head_dim]
  SequenceStep step_;
  CommitStep commit_;
};

// The slot of a block by the plain definition: per-token magnitude times weight.
std::vector<uint8_t> expected_slot(const Sequence& sequence, const SlotLayout& layout,
                                   int32_t layer, bool is_key, int32_t head, int32_t first,
                                   const float* weight) {
  std::vector<float> rows;
  std::vector<uint32_t> masks(size_t{64} * layout.mask_words);
  for (int32_t t = 0; t < kBlockTokens; t++) {
    const std::vector<float>& row = sequence.row(layer, is_key, head, first + t);
    rows.insert(rows.end(), row.begin(), row.end());
    if (!layout.dense) select_row(layout, row.data(), weight, &masks[t * layout.mask_words]);
  }
  std::vector<uint8_t> slot(layout.slot_bytes);
  EXPECT_EQ(pack_block(layout, rows.data(), masks.data(), slot.data()), -1);
  return slot;
}

const uint8_t* slot_of(const Sequence& sequence, const StoreLayout& layout, int32_t block,
                       int32_t layer, bool is_key, int32_t head) {
  return sequence.pages()[block].as<uint8_t>() +
         (is_key ? k_slot_offset(layout, layer, head) : v_slot_offset(layout, layer, head));
}

class CommitTest : public ::testing::TestWithParam<Isa> {};

TEST_P(CommitTest, FollowsTheScheduleThroughPrefillAndDecode) {
  struct Case {
    DType tail, values;
    int32_t head_dim, sinks, window;
    bool group;
  };
  const Case cases[] = {{DType::kBF16, DType::kBF16, 128, 0, 32, true},
                        {DType::kBF16, DType::kInt8, 128, 4, 32, true},
                        {DType::kBF16, DType::kInt4, 128, 1, 0, true},
                        {DType::kF16, DType::kF16, 64, 4, 128, true},
                        {DType::kF16, DType::kInt8, 64, 70, 5, true},
                        {DType::kF32, DType::kF32, 64, 3, 32, true},
                        {DType::kF32, DType::kInt4, 80, 0, 32, false},
                        {DType::kF16, DType::kF16, 128, 0, 32, false},
                        {DType::kBF16, DType::kInt8, 256, 2, 1, false},
                        {DType::kBF16, DType::kF16, 96, 0, 32, true},
                        {DType::kF16, DType::kBF16, 128, 0, 32, true},
                        {DType::kF32, DType::kInt8, 8, 0, 32, true},
                        {DType::kBF16, DType::kInt8, 64, 0, 32, true},
                        {DType::kF16, DType::kInt4, 128, 0, 32, true}};
  for (const Case& c : cases) {
    testing::CacheShape shape;
    shape.n_layers = 2;
    shape.head_dim = c.head_dim;
    shape.values = c.values;
    shape.group_pattern = c.group;
    shape.k_sparsity = 0.6;
    shape.v_sparsity = c.head_dim == 96 ? 0.0 : 0.75;
    const StoreLayout layout = testing::make_layout(shape);
    Sequence sequence(layout, c.tail, c.sinks, c.window, GetParam());
    std::mt19937 random(1);
    sequence.append(2, false, random);  // fewer than the sinks
    sequence.append(150, false, random);
    for (int i = 0; i < 70; i++) sequence.append(1, true, random);
    sequence.append(200, false, random);
    sequence.expect_dense_rows();
    ASSERT_EQ(static_cast<int64_t>(sequence.pages().size()) * kBlockTokens,
              compressed_tokens(sequence.position(), c.sinks, c.window));
    for (int32_t block = 0; block < static_cast<int32_t>(sequence.pages().size()); block++) {
      for (int32_t i = 0; i < 8; i++) {
        const int32_t layer = i / 4, head = i / 2 % 2;
        const bool is_key = i % 2 == 0;
        const SlotLayout& slot = is_key ? layout.k : layout.v;
        const std::vector<uint8_t> expected = expected_slot(
            sequence, slot, layer, is_key, head, c.sinks + block * kBlockTokens, nullptr);
        ASSERT_EQ(
            std::memcmp(expected.data(), slot_of(sequence, layout, block, layer, is_key, head),
                        expected.size()),
            0)
            << dtype_name(c.tail) << " " << dtype_name(c.values) << " " << c.head_dim << " block "
            << block << (is_key ? " key" : " value");
      }
    }
  }
}

TEST_P(CommitTest, ProfileWeightsRank) {
  testing::CacheShape shape;
  shape.head_dim = 128;
  shape.values = DType::kInt8;
  const StoreLayout layout = testing::make_layout(shape);
  std::mt19937 random(2);
  std::vector<float> k_weight(2 * 128), v_weight(2 * 128);
  for (float& x : k_weight) x = std::fabs(testing::random_normal(random));
  for (float& x : v_weight) x = std::fabs(testing::random_normal(random));
  KVTransform transform;
  transform.k_weight = k_weight.data();
  transform.v_weight = v_weight.data();
  Sequence sequence(layout, DType::kBF16, 0, 32, GetParam());
  sequence.step().transform = &transform;
  sequence.append(100, false, random);
  for (int32_t head = 0; head < 2; head++) {
    for (const bool is_key : {true, false}) {
      const SlotLayout& slot = is_key ? layout.k : layout.v;
      const float* weight = (is_key ? k_weight : v_weight).data() + head * 128;
      const std::vector<uint8_t> expected =
          expected_slot(sequence, slot, 0, is_key, head, 0, weight);
      EXPECT_EQ(std::memcmp(expected.data(), slot_of(sequence, layout, 0, 0, is_key, head),
                            expected.size()),
                0);
      EXPECT_NE(expected, expected_slot(sequence, slot, 0, is_key, head, 0, nullptr));
    }
  }
}

TEST_P(CommitTest, OutputAwareRanksByTheWindowsQueries) {
  testing::CacheShape shape;
  shape.head_dim = 64;
  shape.values = DType::kF16;
  const StoreLayout layout = testing::make_layout(shape);
  constexpr int32_t kWindow = 32, kPrompt = 100;
  std::vector<float> ring(2 * kWindow * 64, NAN);
  Sequence sequence(layout, DType::kF16, 0, kWindow, GetParam());
  sequence.step().query_magnitude = ring.data();
  sequence.step().query_window = kWindow;
  std::mt19937 random(3);
  std::vector<float> q(kPrompt * 4 * 64);
  for (float& x : q) x = testing::random_normal(random);
  sequence.step().n_rows = kPrompt;
  record_query_magnitude(sequence.step(), 0, 4, 2, 64, q.data());
  sequence.commit_step().k_policy = static_cast<int32_t>(PrunePolicy::kOutputAware);
  sequence.append(kPrompt, false, random);
  for (int32_t head = 0; head < 2; head++) {
    std::vector<float> weight(64, 0.0f);
    for (int32_t p = kPrompt - kWindow; p < kPrompt; p++) {
      for (int32_t d = 0; d < 64; d++) {
        weight[d] += std::fabs(q[(p * 4 + head * 2) * 64 + d]) +
                     std::fabs(q[(p * 4 + head * 2 + 1) * 64 + d]);
      }
    }
    const std::vector<uint8_t> expected =
        expected_slot(sequence, layout.k, 0, true, head, 0, weight.data());
    EXPECT_EQ(
        std::memcmp(expected.data(), slot_of(sequence, layout, 0, 0, true, head), expected.size()),
        0);
  }

  sequence.step().query_magnitude = nullptr;
  EXPECT_THROW(sequence.append(64, false, random), StateError);
}

TEST_P(CommitTest, BlockPoliciesFillRaggedSlots) {
  for (const PrunePolicy policy : {PrunePolicy::kChannelMagnitude, PrunePolicy::kChannelOutputAware,
                                   PrunePolicy::kChannelStructured}) {
    for (const DType values : {DType::kBF16, DType::kInt8, DType::kInt4}) {
      testing::CacheShape shape;
      shape.head_dim = 64;
      shape.values = values;
      shape.k_sparsity = shape.v_sparsity = 0.7;
      shape.ragged = true;
      const StoreLayout layout = testing::make_layout(shape);
      std::vector<float> ring(2 * 32 * 64, 1.0f);
      for (size_t i = 0; i < ring.size(); i += 64) ring[i + 9] = 1000.0f;  // dim 9 matters most
      Sequence sequence(layout, DType::kBF16, 0, 32, GetParam());
      sequence.step().query_magnitude = ring.data();
      sequence.step().query_window = 32;
      sequence.commit_step().k_policy = static_cast<int32_t>(policy);
      sequence.commit_step().v_policy = static_cast<int32_t>(
          policy == PrunePolicy::kChannelStructured ? PrunePolicy::kChannelMagnitude : policy);
      std::mt19937 random(4);
      sequence.append(100, false, random);
      for (const bool is_key : {true, false}) {
        const SlotLayout& slot = is_key ? layout.k : layout.v;
        const uint8_t* data = slot_of(sequence, layout, 0, 0, is_key, 1);
        std::vector<uint32_t> masks(64 * 2);
        std::memcpy(masks.data(), data, masks.size() * 4);
        std::vector<float> rows(64 * 64);
        unpack_slot(slot, data, rows.data());
        int total = 0, dim9 = 0;
        for (int32_t t = 0; t < 64; t++) {
          const std::vector<float>& original = sequence.row(0, is_key, 1, t);
          for (int32_t d = 0; d < 64; d++) {
            const bool kept = masks[t * 2 + d / 32] >> d % 32 & 1;
            total += kept;
            if (d == 9) dim9 += kept;
            const float tolerance = values == DType::kBF16   ? 0.0f
                                    : values == DType::kInt8 ? 0.03f
                                                             : 0.4f;
            EXPECT_NEAR(rows[t * 64 + d], kept ? original[d] : 0.0f, kept ? tolerance : 0.0f);
          }
        }
        // 20 of 64 tokens a channel; structured: 20 whole channels.
        EXPECT_EQ(total, 20 * 64);
        const bool favours_dim9 = is_key && policy != PrunePolicy::kChannelMagnitude;
        EXPECT_GE(dim9, favours_dim9 ? 50 : 20);
        EXPECT_LE(dim9, favours_dim9 ? 64 : 20);
      }
    }
  }
}

TEST_P(CommitTest, DenseTokensMoveToABufferOfAnotherCapacity) {
  for (const DType tail : {DType::kF32, DType::kBF16}) {
    testing::CacheShape shape;
    shape.n_layers = 2;
    const StoreLayout layout = testing::make_layout(shape);
    Sequence sequence(layout, tail, 3, 32, GetParam());
    std::mt19937 random(6);
    sequence.append(40, false, random);
    sequence.grow(131);
    sequence.expect_dense_rows();
    for (int i = 0; i < 70; i++) sequence.append(1, true, random);
    sequence.grow(99);  // as few as the schedule needs
    sequence.expect_dense_rows();
    sequence.append(60, false, random);
    sequence.expect_dense_rows();
  }
}

TEST_P(CommitTest, RefusesToQuantiseWhatIsNotFinite) {
  for (const DType tail : {DType::kF32, DType::kBF16, DType::kF16}) {
    testing::CacheShape shape;
    shape.n_layers = 2;
    shape.head_dim = 128;
    shape.values = DType::kInt8;
    const StoreLayout layout = testing::make_layout(shape);
    Sequence sequence(layout, tail, 2, 32, GetParam());
    std::mt19937 random(5);
    sequence.append(90, false, random);   // all dense
    const int64_t plane = 1 * 4 + 2 + 1;  // layer 1, value, head 1
    const int64_t at = (plane * sequence.step().dense_capacity + 50) * 128 + 77;
    store_float(sequence.step().dense, tail, at, INFINITY);
    std::vector<uint8_t> before(dtype_bytes(tail, 8 * 98 * 128));
    std::memcpy(before.data(), sequence.step().dense, before.size());
    std::string message;
    try {
      for (int i = 0; i < 8; i++) sequence.append(1, true, random);
    } catch (const StateError& error) {
      message = error.what();
    }
    EXPECT_NE(message.find("value of layer 1 at position 50"), std::string::npos) << message;
    EXPECT_EQ(load_float(sequence.step().dense, tail, at), INFINITY);  // nothing has moved
  }
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, CommitTest, ::testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace mustafar
