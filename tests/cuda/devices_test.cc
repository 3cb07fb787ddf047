// Several GPUs, over the fake runtime: which one is taken, that everything of a model is done and
// released on its own, and that threads find their current device as it was.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/buffer.h"
#include "cuda/memory_pool.h"
#include "fake_runtime.h"
#include "mustafar/engine.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/on_a_thread.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using fake_cuda::runtime;
using testing::on_a_thread;

class CudaDevices : public ::testing::Test {
 protected:
  void SetUp() override {
    setenv("MUSTAFAR_CUBLASLT", MUSTAFAR_FAKE_CUBLASLT, 1);
    fake_cuda::reset();
    runtime().n_devices = 2;
  }
  void TearDown() override {
    EXPECT_EQ(runtime().misuses, std::vector<std::string>{});
    EXPECT_TRUE(runtime().nothing_is_left());
    setenv("MUSTAFAR_CUBLASLT", "off", 1);
  }
};

Model open_model(const std::string& device) {
  ModelConfig config = testing::small_config(
      {.hidden_size = 64, .intermediate_size = 72, .n_layers = 2, .head_dim = 64});
  config.eos_token_ids = {};
  return testing::random_model(config, device, 1, DType::kF16);
}

std::string refusal(const std::string& device) {
  try {
    open_model(device);
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "";
}

KVConfig half_int8() {
  KVConfig kv = testing::half();
  kv.value_dtype = ValueType::kInt8;
  return kv;
}

// A prompt, whose products go to cuBLASLt, and steps of which the later ones are replayed, until
// blocks are compressed.
void use(Session& session, int n_steps = 12) {
  session.prefill(std::vector<int32_t>(130, 5));
  for (int i = 0; i < n_steps; i++) session.decode(7);
}

int current_device() {
  int device = -1;
  cudaGetDevice(&device);
  return device;
}

TEST_F(CudaDevices, AreTakenByTheirNumbers) {
  EXPECT_EQ(open_model("cuda:1").device(), "cuda:1");
  EXPECT_NE(open_model("cuda:1").device_description().find("Another fake GPU"), std::string::npos);
  for (const char* first : {"cuda", "cuda:0", "auto"}) {
    EXPECT_EQ(open_model(first).device(), "cuda") << first;
  }
}

TEST_F(CudaDevices, ANumberThatIsNotThereSaysHowManyAre) {
  EXPECT_EQ(refusal("cuda:2"),
            "device \"cuda:2\": the driver finds 2 NVIDIA GPUs, numbered from 0 (are others hidden "
            "by CUDA_VISIBLE_DEVICES?)");
  runtime().n_devices = 1;
  EXPECT_EQ(refusal("cuda:1"),
            "device \"cuda:1\": the driver finds 1 NVIDIA GPU, numbered from 0 (are others hidden "
            "by CUDA_VISIBLE_DEVICES?)");
  EXPECT_EQ(refusal("cuda:0"), "");
  runtime().n_devices = 0;
  EXPECT_NE(refusal("cuda:1").find("device \"cuda:1\": the driver finds no NVIDIA GPU"),
            std::string::npos);
}

// Without the scope each of these is what the other tests must not see.
TEST_F(CudaDevices, TheFakeSeesAForgottenScope) {
  on_a_thread([] {
    cuda::DeviceBuffer buffer;
    cuda::Stream stream = nullptr;
    {
      const cuda::DeviceScope scope(1);
      buffer.ensure<uint8_t>(100);
      stream = cuda::make_stream();
    }
    EXPECT_EQ(runtime().n_by_default, 0);
    const uint8_t byte = 1;
    EXPECT_THROW(cuda::copy_to_device(buffer.data(), &byte, 1, nullptr), Error);
    EXPECT_EQ(runtime().n_by_default, 1) << "and the first device has got a context";
    EXPECT_THROW(cuda::synchronize(stream), Error);
    void* const memory = buffer.data();
    cuda::DeviceBuffer(std::move(buffer)).ensure<uint8_t>(200);  // releases where it allocated
    EXPECT_EQ(runtime().device_of.count(memory), 0u);
    cuda::destroy_stream(stream);
  });
  EXPECT_EQ(runtime().misuses,
            (std::vector<std::string>{
                "cudaMemcpyAsync with what is of device 1 while device 0 is current",
                "cudaStreamSynchronize with what is of device 1 while device 0 is current",
                "cudaStreamDestroy with what is of device 1 while device 0 is current"}));
  runtime().misuses.clear();
}

TEST_F(CudaDevices, ScopesNestAndLeaveTheThreadAsItWas) {
  on_a_thread([] {
    {
      const cuda::DeviceScope outer(1);
      EXPECT_EQ(cuda::current_device(), 1);
      {
        const cuda::DeviceScope same(1), other(0);
        EXPECT_EQ(cuda::current_device(), 0);
      }
      EXPECT_EQ(cuda::current_device(), 1);
    }
    EXPECT_EQ(runtime().n_by_default, 0);
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    EXPECT_EQ(runtime().n_by_default, 1) << "the thread had no device before the scope";
  });
}

TEST_F(CudaDevices, EverythingIsDoneOnTheModelsOwn) {
  on_a_thread([] {
    const Model model = open_model("cuda:1");
    EXPECT_EQ(runtime().used_bytes(1), model.memory().weights_bytes);
    Session session(model, half_int8());
    use(session);
    Session fork = session.fork();
    fork.rewind(100);
    fork.decode(3);
    SamplingParams params;
    params.max_new_tokens = 4;
    fork.generate(std::vector<int32_t>{1, 2, 3}, params);
    EXPECT_GT(runtime().used_bytes(1), model.memory().weights_bytes);
    EXPECT_EQ(runtime().used_bytes(0), 0);
  });
  EXPECT_EQ(runtime().n_by_default, 0) << "calls that would have made a context on the first";
  EXPECT_GT(runtime().n_launches[1], 100);
  EXPECT_EQ(runtime().n_launches[0], 0);
  EXPECT_GE(runtime().count("cudaGraphLaunch"), 8);
}

TEST_F(CudaDevices, CallersKeepTheirCurrentDevice) {
  for (const int theirs : {0, 1}) {
    on_a_thread([&] {
      ASSERT_EQ(cudaSetDevice(theirs), cudaSuccess);
      const auto model = std::make_unique<const Model>(open_model(theirs == 0 ? "cuda:1" : "cuda"));
      EXPECT_EQ(current_device(), theirs);
      auto session = std::make_unique<Session>(*model, half_int8());
      use(*session);
      EXPECT_EQ(current_device(), theirs);
      EXPECT_THROW(session->decode(100000), std::exception);
      EXPECT_EQ(current_device(), theirs);
      session.reset();
      EXPECT_EQ(current_device(), theirs);
    });
  }
}

TEST_F(CudaDevices, AnyThreadReleases) {
  auto model = std::make_unique<Model>(open_model("cuda:1"));
  auto session = std::make_unique<Session>(*model, half_int8());
  on_a_thread([&] { use(*session); });
  on_a_thread([&] {
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    model.reset();  // the session holds what it needs
    session.reset();
    EXPECT_EQ(runtime().used_bytes(), 0);
  });
}

TEST_F(CudaDevices, TwoModelsAreUsedByTurns) {
  const Model first = open_model("cuda"), second = open_model("cuda:1");
  std::vector<std::unique_ptr<Session>> sessions;
  for (int i = 0; i < 4; i++) {
    sessions.push_back(std::make_unique<Session>(i % 2 == 0 ? first : second, half_int8()));
  }
  for (const auto& session : sessions) use(*session, 2);
  // Each thread goes round all sessions, none of which is used by two at once.
  for (int round = 0; round < 8; round++) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; t++) {
      threads.emplace_back([&, t] {
        Session& session = *sessions[(t + round) % 4];
        for (int i = 0; i < 3; i++) session.decode(7);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_GT(runtime().n_launches[0], 50);
  EXPECT_EQ(runtime().n_launches[0], runtime().n_launches[1]);
  EXPECT_GT(runtime().used_bytes(0), 0);
  EXPECT_EQ(runtime().used_bytes(0), runtime().used_bytes(1));
}

TEST_F(CudaDevices, EnginesOfSeveral) {
  const Model models[] = {open_model("cuda"), open_model("cuda:1")};
  std::vector<std::unique_ptr<Engine>> engines;
  for (const Model& model : models) {
    engines.push_back(std::make_unique<Engine>(model, half_int8(), EngineOptions{}));
  }
  SamplingParams params;
  params.max_new_tokens = 10;
  std::vector<Request> requests;
  for (int i = 0; i < 6; i++) {
    requests.push_back(engines[i % 2]->submit(std::vector<int32_t>(90 + i, 5), params));
  }
  for (const Request& request : requests) EXPECT_EQ(request.result().token_ids.size(), 10u);
  EXPECT_GT(runtime().n_launches[1], 50);
}

TEST_F(CudaDevices, EachHasMemoryOfItsOwn) {
  const int64_t needed = open_model("cuda").memory().weights_bytes;
  fake_cuda::reset();
  runtime().n_devices = 2;
  runtime().memory_bytes = needed * 3 / 2;
  const Model first = open_model("cuda"), second = open_model("cuda:1");
  EXPECT_EQ(runtime().used_bytes(0), needed);
  EXPECT_EQ(runtime().used_bytes(1), needed);
  try {
    open_model("cuda:1");
    FAIL() << "the weights went where they do not fit";
  } catch (const OutOfMemory& error) {
    EXPECT_NE(std::string(error.what()).find("\"cuda:1\""), std::string::npos) << error.what();
  }
}

TEST_F(CudaDevices, PoolsKeepTheirOwnMemory) {
  cuda::MemoryPool pool(1000, 1);
  void* const kept = pool.take(300);
  EXPECT_EQ(runtime().used_bytes(1), 300);
  pool.give(kept, 300);
  void* const other = pool.take(900);
  pool.give(other, 900);  // beside the first there is no room
  EXPECT_EQ(runtime().used_bytes(1), 300);
}

// As on the first device (runtime_test.cc): no call may fail unseen, on whichever.
TEST_F(CudaDevices, EveryFailingCallIsReportedAndNothingLeaks) {
  const auto use_once = [] {
    const Model model = open_model("cuda:1");
    Session session(model, half_int8());
    use(session, 3);
  };
  use_once();  // the device's properties are asked for once a process
  fake_cuda::reset();
  runtime().n_devices = 2;
  use_once();
  const int64_t n_calls = runtime().n_calls;
  ASSERT_GT(n_calls, 100);
  for (int64_t i = 0; i < n_calls; i++) {
    fake_cuda::reset();
    runtime().n_devices = 2;
    runtime().fail_at = i;
    std::string message;
    try {
      use_once();
    } catch (const Error& error) {
      message = error.what();
    }
    EXPECT_NE(message.find("made to fail"), std::string::npos)
        << "call " << i << ", " << runtime().failed_call << ": " << message;
    EXPECT_TRUE(runtime().nothing_is_left()) << "after call " << i << ", " << runtime().failed_call;
  }
}

}  // namespace
}  // namespace mustafar
