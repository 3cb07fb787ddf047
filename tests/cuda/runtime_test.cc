// The CUDA backend's host code over the fake runtime: messages, checks, releases and graphs.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "fake_runtime.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using fake_cuda::runtime;

class CudaHost : public ::testing::Test {
 protected:
  void SetUp() override {
    setenv("MUSTAFAR_CUBLASLT", "off", 1);
    fake_cuda::reset();
  }
  void TearDown() override { EXPECT_TRUE(runtime().nothing_is_left()); }
};

Model open_model(const char* device) {
  ModelConfig config = testing::small_config(
      {.hidden_size = 64, .intermediate_size = 72, .n_layers = 2, .head_dim = 64});
  config.eos_token_ids = {};
  return testing::random_model(config, device, 1, DType::kF16);
}

// Why the GPU is refused; empty where it isn't. In that case auto must be the CPU.
std::string refusal() {
  EXPECT_EQ(open_model("cpu").device(), "cpu");
  try {
    open_model("cuda");
  } catch (const DeviceError& error) {
    EXPECT_EQ(open_model("auto").device(), "cpu");
    return error.what();
  }
  EXPECT_EQ(open_model("auto").device(), "cuda");
  return "";
}

TEST_F(CudaHost, AHealthyDeviceIsTaken) { EXPECT_EQ(refusal(), ""); }

TEST_F(CudaHost, NoDriver) {
  runtime().driver_version = 0;
  EXPECT_EQ(refusal(),
            "device \"cuda\": the NVIDIA driver (libcuda.so.1) was not found; this build needs one "
            "for CUDA " +
                std::to_string(CUDART_VERSION / 1000) + "." +
                std::to_string(CUDART_VERSION % 1000 / 10) + " or newer");
}

TEST_F(CudaHost, AnOldDriver) {
  runtime().driver_version = 12040;
  runtime().device_count_status = cudaErrorInsufficientDriver;
  EXPECT_NE(refusal().find("the NVIDIA driver (libcuda.so.1) supports CUDA 12.4, this build needs"),
            std::string::npos)
      << refusal();
}

TEST_F(CudaHost, NoDevice) {
  runtime().device_count_status = cudaErrorNoDevice;
  EXPECT_NE(refusal().find("finds no NVIDIA GPU"), std::string::npos) << refusal();
  runtime().device_count_status = cudaSuccess;
  runtime().n_devices = 0;
  EXPECT_NE(refusal().find("finds no NVIDIA GPU"), std::string::npos) << refusal();
}

TEST_F(CudaHost, ADeviceThatCannotBeUsed) {
  const std::string expected = "the GPU can't be used: cudaErrorOfTheTest, made to fail";
  runtime().device_count_status = cudaErrorSystemNotReady;
  EXPECT_NE(refusal().find(expected), std::string::npos) << refusal();
  runtime().device_count_status = cudaSuccess;
  runtime().init_device_status = cudaErrorDevicesUnavailable;
  EXPECT_NE(refusal().find(expected), std::string::npos) << refusal();
}

TEST_F(CudaHost, NoCodeForTheDevice) {
  for (const cudaError_t status : {cudaErrorInvalidDeviceFunction, cudaErrorNoKernelImageForDevice,
                                   cudaErrorUnsupportedPtxVersion}) {
    runtime().kernel_status = status;
    EXPECT_NE(refusal().find("no code for Fake GPU (sm_75); it was built for sm_"),
              std::string::npos)
        << refusal();
  }
}

TEST_F(CudaHost, WeightsThatDoNotFitAreNotUploaded) {
  const int64_t needed = open_model("cuda").memory().weights_bytes;
  fake_cuda::reset();
  runtime().memory_bytes = needed - 1;
  try {
    open_model("cuda");
    FAIL() << "the weights went where they do not fit";
  } catch (const OutOfMemory& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("take " + std::to_string(needed) + " bytes"), std::string::npos)
        << message;
    EXPECT_NE(message.find("has " + std::to_string(needed - 1) + " free"), std::string::npos)
        << message;
  }
  EXPECT_EQ(runtime().count("cudaMemcpyAsync"), 0);
}

// A prompt, then decode steps until two blocks are compressed; one step is recorded, others replay.
void use_model(int n_steps) {
  const Model model = open_model("cuda");
  KVConfig kv;
  kv.sparsity = 0.5;
  kv.value_dtype = ValueType::kInt8;
  Session session(model, kv);
  session.prefill(std::vector<int32_t>(130, 5));
  for (int i = 0; i < n_steps; i++) session.decode(7);
}

TEST_F(CudaHost, DecodeStepsAreReplayed) {
  use_model(12);
  const int64_t replayed = runtime().count("cudaGraphLaunch");
  EXPECT_GE(replayed, 8) << "of 12 steps";
  EXPECT_EQ(runtime().count("cudaGraphInstantiate"), runtime().count("cudaStreamBeginCapture"));
}

// Also where a policy looks at the queries, and where sequences of a batch are stored differently.
TEST_F(CudaHost, DecodeStepsOfEveryPolicyAreReplayed) {
  const Model model = open_model("cuda");
  KVConfig aware;
  aware.sparsity = 0.5;
  aware.k_policy = PrunePolicy::kOutputAware;
  Session a(model, aware), b(model, KVConfig{});
  a.prefill(std::vector<int32_t>(130, 5));
  b.prefill(std::vector<int32_t>(70, 5));
  Session* const both[] = {&a, &b};
  const std::vector<int32_t> ids = {7, 8};
  for (int i = 0; i < 6; i++) a.decode(7);
  const int64_t alone = runtime().count("cudaGraphLaunch");
  EXPECT_GE(alone, 4) << "of 6 steps";
  for (int i = 0; i < 6; i++) Session::decode_batch(both, ids);
  EXPECT_GE(runtime().count("cudaGraphLaunch"), alone + 4) << "of 6 steps";
}

// A tail that grows takes what an earlier one freed.
TEST_F(CudaHost, MemoryIsUsedAgain) {
  const Model model = open_model("cuda");
  const auto allocations_of_growth = [&] {
    Session session(model, KVConfig{});
    session.prefill(std::vector<int32_t>(10, 5));
    for (int i = 0; i < 3; i++) session.decode(7);
    const int64_t before = runtime().count("cudaMalloc");
    for (int i = 0; i < 90; i++) session.decode(7);
    return runtime().count("cudaMalloc") - before;
  };
  EXPECT_GT(allocations_of_growth(), 0);
  EXPECT_EQ(allocations_of_growth(), 0);
}

#if defined(MUSTAFAR_CUDA_DEBUG)
TEST_F(CudaHost, DebugBuildsWaitForEveryKernel) {
  use_model(1);  // without a graph
  const std::vector<std::string>& log = runtime().log;
  for (size_t i = 0; i < log.size(); i++) {
    if (log[i] != "launch") continue;
    ASSERT_LT(i + 2, log.size());
    EXPECT_EQ(log[i + 1], "cudaStreamIsCapturing");
    EXPECT_EQ(log[i + 2], "cudaStreamSynchronize");
  }
}
#endif

// No call may fail unseen: each in turn, while a model is used.
TEST_F(CudaHost, EveryFailingCallIsReportedAndNothingLeaks) {
  use_model(4);  // the device's properties are asked for once a process
  fake_cuda::reset();
  use_model(4);
  const int64_t n_calls = runtime().n_calls;
  ASSERT_GT(n_calls, 100);
  for (int64_t i = 0; i < n_calls; i++) {
    fake_cuda::reset();
    runtime().fail_at = i;
    std::string message;
    try {
      use_model(4);
    } catch (const Error& error) {
      message = error.what();
    }
    EXPECT_NE(message.find("made to fail"), std::string::npos)
        << "call " << i << ", " << runtime().failed_call << ": " << message;
    EXPECT_TRUE(runtime().nothing_is_left()) << "after call " << i << ", " << runtime().failed_call;
  }
}

TEST_F(CudaHost, EveryFailingAllocationIsReportedWithTheNumbers) {
  runtime().fail_allocations_only = true;
  use_model(4);
  const int64_t n_allocations = runtime().n_calls;
  ASSERT_GT(n_allocations, 20);
  for (int64_t i = 0; i < n_allocations; i++) {
    fake_cuda::reset();
    runtime().fail_allocations_only = true;
    runtime().fail_at = i;
    runtime().fail_with = cudaErrorMemoryAllocation;
    std::string message;
    try {
      use_model(4);
    } catch (const OutOfMemory& error) {
      message = error.what();
    }
    EXPECT_NE(message.find("can't allocate "), std::string::npos)
        << "allocation " << i << ", " << runtime().failed_call << ": " << message;
    EXPECT_TRUE(runtime().nothing_is_left()) << "after allocation " << i;
  }
}

}  // namespace
}  // namespace mustafar
