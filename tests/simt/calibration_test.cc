// Calibration on a device whose memory the host can't read, against the CPU.
#include "mustafar/calibration.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "core/thread_pool.h"
#include "runtime/kv_statistics.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using testing::ids_of;

Model random_model(const char* device, DType dtype) {
  const ModelConfig config = testing::small_config(
      {.hidden_size = 32, .intermediate_size = 40, .n_layers = 2, .max_position_embeddings = 100});
  return testing::random_model(config, device, 1, dtype);
}

TEST(CudaCalibration, StatisticsAreThoseOfTheCpu) {
  for (const auto& [dtype, tolerance] : {std::pair{DType::kF32, 1e-4}, {DType::kBF16, 2e-2}}) {
    const Model cpu = random_model("cpu", dtype), gpu = random_model("cuda", dtype);
    ThreadPool pool(1);
    const std::vector<std::vector<int32_t>> texts = {ids_of(37), ids_of(70)};
    const KVStatistics a = gather_kv_statistics(cpu, texts, 4, pool);
    const KVStatistics b = gather_kv_statistics(gpu, texts, 4, pool);
    EXPECT_EQ(a.tokens, 37 + 70 - 8);
    EXPECT_EQ(b.tokens, a.tokens);
    for (const auto sums : {&KVStatistics::keys, &KVStatistics::values, &KVStatistics::queries,
                            &KVStatistics::outputs}) {
      ASSERT_EQ((a.*sums).size(), (b.*sums).size());
      const double largest = *std::max_element((a.*sums).begin(), (a.*sums).end());
      EXPECT_GT(largest, 0);
      for (size_t i = 0; i < (a.*sums).size(); i++) {
        ASSERT_NEAR((a.*sums)[i], (b.*sums)[i], tolerance * largest) << i;
      }
    }
  }
}

TEST(CudaCalibration, MakesAProfile) {
  const Model gpu = random_model("cuda", DType::kF32);
  const std::vector<Prompt> texts = {ids_of(250)};  // three pieces
  CalibrationOptions options;
  options.scale_power = 0.5;
  const Profile profile = calibrate(gpu, texts, options);
  profile.check(gpu.config(), gpu.fingerprint());
  const int64_t d = 16;
  for (int64_t i = 0; i < d; i++) {  // F B = I, of the first head
    for (int64_t j = 0; j < d; j++) {
      double sum = 0;
      for (int64_t k = 0; k < d; k++) {
        sum += double{profile.k_forward[i * d + k]} * profile.k_backward[k * d + j];
      }
      EXPECT_NEAR(sum, i == j ? 1 : 0, 1e-4);
    }
  }
}

}  // namespace
}  // namespace mustafar
