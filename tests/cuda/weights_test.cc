// Integer weights on their way to the device, over the fake runtime: what lies there when a model
// is loaded, how much it is, and calls that fail meanwhile.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fake_runtime.h"
#include "mustafar/error.h"
#include "support/quantised_source.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using fake_cuda::runtime;
using testing::Int4Matrix;
using testing::PartlyQuantised;

class CudaWeights : public ::testing::Test {
 protected:
  void SetUp() override {
    setenv("MUSTAFAR_CUBLASLT", "off", 1);
    fake_cuda::reset();
  }
  void TearDown() override { EXPECT_TRUE(runtime().nothing_is_left()); }
};

// Sizes that fill neither tiles of rows nor groups of inputs.
ModelConfig config() {
  return testing::small_config(
      {.hidden_size = 72, .intermediate_size = 200, .n_layers = 2, .head_dim = 64});
}

std::shared_ptr<const TensorSource> dense() { return random_tensors(config(), DType::kBF16, 7); }
std::shared_ptr<const TensorSource> codes() { return PartlyQuantised::with<Int4Matrix>(config()); }

Model load(const char* device, const std::string& weights,
           std::shared_ptr<const TensorSource> source) {
  ModelOptions options;
  options.device = device;
  options.threads = 2;
  options.weights = weights;
  return make_model(config(), std::move(source), options);
}

void expect_on_the_device(const std::string& weights,
                          const std::shared_ptr<const TensorSource>& source) {
  SCOPED_TRACE(weights);
  const Model on_cpu = load("cpu", weights, source);
  const Model on_device = load("auto", weights, source);
  ASSERT_EQ(on_device.device(), "cuda");
  EXPECT_EQ(on_device.weights(), on_cpu.weights());
  EXPECT_EQ(on_device.fingerprint(), on_cpu.fingerprint());
  EXPECT_EQ(on_device.memory().weights_bytes, on_cpu.memory().weights_bytes);
  EXPECT_EQ(runtime().used_bytes(), on_device.memory().weights_bytes);
  const std::vector<Matrix> theirs = testing::matrices_of(on_cpu.impl()->weights.table);
  const std::vector<Matrix> ours = testing::matrices_of(on_device.impl()->weights.table);
  ASSERT_EQ(ours.size(), theirs.size());
  int n_quantised = 0;
  for (size_t i = 0; i < ours.size(); i++) {
    SCOPED_TRACE("matrix " + std::to_string(i));
    ASSERT_EQ(ours[i].dtype, theirs[i].dtype);
    if (!ours[i].quantised()) continue;
    n_quantised++;
    const QuantisedShape shape = ours[i].shape();
    const auto memory = runtime().device_memory.find(const_cast<void*>(ours[i].data));
    ASSERT_NE(memory, runtime().device_memory.end()) << "not the beginning of an allocation";
    EXPECT_EQ(memory->second, shape.bytes());
    const Matrix whole = Matrix::of(shape, ours[i].data);
    EXPECT_EQ(ours[i].scales, whole.scales);
    EXPECT_EQ(ours[i].offsets, whole.offsets);
    EXPECT_EQ(testing::bytes_of(ours[i]), testing::bytes_of(theirs[i]));
  }
  EXPECT_EQ(n_quantised, weights == "auto" ? 1 : static_cast<int>(ours.size()));
}

TEST_F(CudaWeights, TheDeviceHasTheCodesOfTheCpu) {
  for (const char* weights : {"int8", "int4", "int4:64", "int8:row"}) {
    expect_on_the_device(weights, dense());
  }
  expect_on_the_device("auto", codes());
}

// Why a model can't be loaded; empty where it can.
std::string lack_of_memory(const std::string& weights) {
  try {
    load("cuda", weights, dense());
  } catch (const OutOfMemory& error) {
    return error.what();
  }
  return "";
}

TEST_F(CudaWeights, RoomIsNeededForTheCodesAlone) {
  const int64_t stored = load("cuda", "auto", dense()).memory().weights_bytes;
  const int64_t int4 = load("cuda", "int4", dense()).memory().weights_bytes;
  ASSERT_LT(int4, stored);

  runtime().memory_bytes = int4;
  EXPECT_EQ(lack_of_memory("int4"), "");
  EXPECT_NE(lack_of_memory("auto").find("take " + std::to_string(stored) + " bytes"),
            std::string::npos)
      << lack_of_memory("auto");

  fake_cuda::reset();
  runtime().memory_bytes = int4 - 1;
  const std::string message = lack_of_memory("int4");
  EXPECT_NE(message.find("take " + std::to_string(int4) + " bytes"), std::string::npos) << message;
  EXPECT_NE(message.find("has " + std::to_string(int4 - 1) + " free"), std::string::npos)
      << message;
  EXPECT_EQ(runtime().count("cudaMemcpyAsync"), 0);
}

TEST_F(CudaWeights, EveryFailingCallIsReportedAndNothingLeaks) {
  for (const auto& [weights, source] :
       {std::pair("int8", dense()), std::pair("int4", dense()), std::pair("auto", codes())}) {
    fake_cuda::reset();
    load("cuda", weights, source);
    const int64_t n_calls = runtime().n_calls;
    ASSERT_GT(n_calls, 50);
    for (int64_t i = 0; i < n_calls; i++) {
      SCOPED_TRACE(std::string(weights) + ", call " + std::to_string(i));
      fake_cuda::reset();
      runtime().fail_at = i;
      std::string message;
      try {
        load("cuda", weights, source);
      } catch (const Error& error) {
        message = error.what();
      }
      EXPECT_NE(message.find("made to fail"), std::string::npos)
          << runtime().failed_call << ": " << message;
      EXPECT_TRUE(runtime().nothing_is_left()) << "after " << runtime().failed_call;
    }
  }
}

TEST_F(CudaWeights, EveryFailingAllocationIsReportedWithTheNumbers) {
  for (const char* weights : {"int8", "int4"}) {
    fake_cuda::reset();
    runtime().fail_allocations_only = true;
    load("cuda", weights, dense());
    const int64_t n_allocations = runtime().n_calls;
    ASSERT_GT(n_allocations, 14);
    for (int64_t i = 0; i < n_allocations; i++) {
      SCOPED_TRACE(std::string(weights) + ", allocation " + std::to_string(i));
      fake_cuda::reset();
      runtime().fail_allocations_only = true;
      runtime().fail_at = i;
      runtime().fail_with = cudaErrorMemoryAllocation;
      EXPECT_NE(lack_of_memory(weights).find("can't allocate "), std::string::npos)
          << runtime().failed_call;
      EXPECT_TRUE(runtime().nothing_is_left());
    }
  }
}

}  // namespace
}  // namespace mustafar
