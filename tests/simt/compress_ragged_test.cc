// Compression under the policies that fix a block's counts, byte for byte what the CPU backend
// writes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/compress/commit.h"
#include "cuda/compress.h"
#include "device_memory.h"
#include "mustafar/error.h"
#include "mustafar/kv_config.h"
#include "support/kv_test_util.h"

namespace mustafar::cuda {
namespace {

using testing::random_normal;

struct Case {
  const char* name;
  int32_t head_dim;
  DType tail, values;
  double sparsity;
  PrunePolicy k, v;
};

constexpr int32_t kLayers = 2, kHeads = 2, kSinks = 3, kQueryWindow = 8;
constexpr int32_t kDenseCapacity = 80, kDenseTokens = 40, kFreshTokens = 100, kNewBlocks = 1,
                  kEndPos = 1001;

// A commit of one block whose rows straddle dense and fresh.
class Commit {
 public:
  explicit Commit(const Case& c) : case_(c), random_(static_cast<uint32_t>(c.head_dim)) {
    const auto slot = [&](bool is_key, PrunePolicy policy) {
      return make_slot_layout(c.head_dim, is_key, c.sparsity, !per_channel(policy), c.values,
                              per_channel(policy));
    };
    layout_ = make_store_layout(kLayers, kHeads, slot(true, c.k), slot(false, c.v));
    dense_ = rows(kLayers * 2 * kHeads * kDenseCapacity);
    fresh_ = rows(2 * kHeads * kFreshTokens);
    magnitude_ = sizes(int64_t{kLayers} * kHeads * kQueryWindow * c.head_dim);
    weights_ = sizes(int64_t{kLayers} * kHeads * c.head_dim);
    SequenceView& sequence = step_.sequence;
    step_.layout = &layout_;
    sequence.dense = dense_->host();
    sequence.dense_capacity = kDenseCapacity;
    sequence.dense_tokens = kDenseTokens;
    sequence.n_sinks = kSinks;
    sequence.fresh = fresh_->host();
    sequence.fresh_capacity = kFreshTokens;
    sequence.query_magnitude = magnitude_->host();
    sequence.query_window = kQueryWindow;
    step_.dense_tokens = kDenseTokens;
    step_.fresh_tokens = kFreshTokens;
    step_.n_new_blocks = kNewBlocks;
    step_.end_pos = kEndPos;
    step_.k_policy = c.k;
    step_.v_policy = c.v;
  }

  void use_profile_weights() { weigh(step_.sequence, weights_->host()); }

  // Value d of row `index` of the run, head 0 of layer 1.
  void set(int kind, int32_t index, int32_t d, float x) {
    ASSERT_GE(index, kDenseTokens);
    store_float(fresh_->host(), case_.tail,
                (int64_t{kind} * kHeads * kFreshTokens + index - kDenseTokens) * case_.head_dim + d,
                x);
  }

  // The page as the CPU backend fills it. Throws StateError as that does.
  std::vector<uint8_t> on_cpu() {
    ThreadPool pool(1);
    HostBuffer page(layout_.page_bytes), dense_out(dense_->bytes());
    std::memset(page.data(), 0xff, layout_.page_bytes);
    uint8_t* const address = page.as<uint8_t>();
    step_.new_pages = &address;
    step_.dense_out = dense_out.as<uint8_t>();
    commit_blocks(pool, detect_isa(), case_.tail, {&step_, 1}, 0, kLayers);
    return {address, address + layout_.page_bytes};
  }

  std::vector<uint8_t> on_device() {
    DeviceMemory page(layout_.page_bytes, "the page");
    const DeviceArray<uint8_t*> address(std::vector<uint8_t*>{page.device()});
    dense_->upload();
    fresh_->upload();
    CommitView view = step_;
    view.sequence.dense = dense_->device();
    view.sequence.fresh = fresh_->device();
    view.sequence.query_magnitude = magnitude_->device();
    if (view.sequence.transform.k_weight != nullptr) weigh(view.sequence, weights_->device());
    view.new_pages = address.device();
    view.dense_out = nullptr;  // move_rest()'s
    const DeviceArray<CommitView> steps(std::vector<CommitView>{view});
    DeviceArray<int32_t> bad(std::vector<int32_t>{bad_row}, "bad_row");
    CompressArgs args;
    args.steps = steps.device();
    args.n_steps = 1;
    args.max_new_blocks = kNewBlocks;
    args.layout = layout_;
    args.n_layers = kLayers;
    args.tail_dtype = case_.tail;
    args.bad_row = bad.device();
    compress(args, nullptr);
    page.download();
    bad.download();
    bad_row = *bad.host();
    return {page.host(), page.host() + layout_.page_bytes};
  }

  const StoreLayout& layout() const { return layout_; }
  int32_t bad_row = kAllFinite;

 private:
  static void weigh(SequenceView& sequence, const float* weights) {
    sequence.transform.k_weight = sequence.transform.v_weight = weights;
  }

  std::unique_ptr<DeviceMemory> rows(int64_t n) {
    const int64_t values = n * case_.head_dim;
    auto memory = std::make_unique<DeviceMemory>(dtype_bytes(case_.tail, values), "rows");
    for (int64_t i = 0; i < values; i++) {  // ties and zeros are common
      const float x = random_normal(random_);
      store_float(memory->host(), case_.tail, i, random_() % 4 == 0 ? std::round(x) : x);
    }
    return memory;
  }

  std::unique_ptr<DeviceArray<float>> sizes(int64_t n) {
    std::vector<float> values(n);
    for (float& x : values) x = std::fabs(random_normal(random_));
    return std::make_unique<DeviceArray<float>>(values);
  }

  Case case_;
  std::mt19937 random_;
  StoreLayout layout_;
  std::unique_ptr<DeviceMemory> dense_, fresh_;
  std::unique_ptr<DeviceArray<float>> magnitude_, weights_;
  CommitStep step_;
};

class CompressRaggedTest : public ::testing::TestWithParam<Case> {};

TEST_P(CompressRaggedTest, EqualsTheCpuBackendByteForByte) {
  for (const bool profile : {false, true}) {
    Commit commit(GetParam());
    if (profile) commit.use_profile_weights();
    if (is_float(GetParam().values)) {
      commit.set(0, 50, 1, NAN);
      commit.set(0, 50, 2, -INFINITY);
      commit.set(1, 51, 3, -NAN);
    }
    const std::vector<uint8_t> expected = commit.on_cpu();
    set_schedule(profile ? 2 : 1);
    const std::vector<uint8_t> page = commit.on_device();
    ASSERT_EQ(page.size(), expected.size());
    const auto differs = std::mismatch(page.begin(), page.end(), expected.begin());
    EXPECT_TRUE(differs.first == page.end())
        << "byte " << differs.first - page.begin() << " of " << page.size() << ", profile "
        << profile << ", K slots of " << commit.layout().k.slot_bytes << " bytes";
    EXPECT_EQ(commit.bad_row, kAllFinite);
  }
}

constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16;
constexpr DType kInt8 = DType::kInt8, kInt4 = DType::kInt4;
constexpr PrunePolicy kByToken = PrunePolicy::kMagnitude, kPlain = PrunePolicy::kChannelMagnitude;
constexpr PrunePolicy kAware = PrunePolicy::kChannelOutputAware;
constexpr PrunePolicy kWhole = PrunePolicy::kChannelStructured;
INSTANTIATE_TEST_SUITE_P(Policies, CompressRaggedTest,
                         ::testing::Values(Case{"magnitude", 128, kBF16, kBF16, 0.7, kPlain,
                                                kPlain},
                                           Case{"aware", 64, kBF16, kInt8, 0.5, kAware, kAware},
                                           Case{"whole", 128, kF16, kF16, 0.6, kWhole, kByToken},
                                           Case{"mixed", 80, kF16, kInt4, 0.7, kAware, kPlain},
                                           Case{"values", 8, kF32, kF32, 0.5, kByToken, kAware},
                                           Case{"narrow", 24, kF32, kInt4, 0.3, kWhole, kAware},
                                           Case{"wide", 256, kBF16, kInt8, 0.9, kPlain, kByToken}),
                         [](const ::testing::TestParamInfo<Case>& info) {
                           return std::string(info.param.name) + "_" +
                                  dtype_name(info.param.values) + "_" +
                                  std::to_string(info.param.head_dim);
                         });

TEST(CompressRagged, NonFiniteRowsAreNamed) {
  Commit commit({"", 64, kBF16, kInt8, 0.5, kPlain, kPlain});
  commit.set(1, 60, 9, INFINITY);
  commit.set(1, 55, 9, NAN);
  EXPECT_THROW(commit.on_cpu(), StateError);
  // 140 tokens end at position 1001; the fresh buffer serves both layers: row 55 is position 916.
  commit.on_device();
  EXPECT_EQ(commit.bad_row, 1 * kBadRowPositions + 916);
}

}  // namespace
}  // namespace mustafar::cuda
