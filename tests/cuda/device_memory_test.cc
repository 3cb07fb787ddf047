// The memory that the kernels' suites use on a device (tests/simt/device_memory.h), over the fake
// runtime: it must find what it is there to find.
#include "device_memory.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "fake_runtime.h"

namespace mustafar::cuda {
namespace {

class DeviceMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override { fake_cuda::reset(); }
  void TearDown() override { EXPECT_TRUE(fake_cuda::runtime().nothing_is_left()); }

  // What download() says; empty where it is content.
  static std::string complaint(DeviceMemory& memory) {
    try {
      memory.download();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }
};

TEST_F(DeviceMemoryTest, BeginsAsNaNsAndIsCopiedOnDemand) {
  DeviceArray<uint8_t> memory(5);
  EXPECT_EQ(memory.device()[4], 0xff);
  EXPECT_EQ(memory.host()[4], 0xff);
  memory.host()[4] = 1;
  EXPECT_EQ(memory.device()[4], 0xff) << "the kernels' memory is the mirror";
  memory.upload();
  EXPECT_EQ(memory.device()[4], 1);
  memory.device()[0] = 2;  // what a kernel would do
  EXPECT_EQ(complaint(memory), "");
  EXPECT_EQ(memory.host()[0], 2);
  memory.poison();
  EXPECT_EQ(memory.device()[0], 0xff);
  EXPECT_EQ(memory.host()[4], 0xff);
  const DeviceArray<float> floats(std::vector<float>{1.5f, 2.5f});
  EXPECT_EQ(floats.device()[1], 2.5f);
}

TEST_F(DeviceMemoryTest, FindsWritesAroundIt) {
  DeviceMemory memory(5, "the output");
  memory.device()[5] = 0;
  EXPECT_EQ(complaint(memory), "a write past the end of the output of 5 bytes");
  DeviceMemory other(64, "the partials");
  other.device()[-1] = 0;
  EXPECT_EQ(complaint(other), "a write before the start of the partials of 64 bytes");
}

TEST_F(DeviceMemoryTest, ReportsAKernelThatFailed) {
  DeviceMemory memory(5);
  fake_cuda::runtime().fail_at = fake_cuda::runtime().n_calls + 1;  // the wait after the copy
  EXPECT_NE(complaint(memory).find("made to fail"), std::string::npos);
}

}  // namespace
}  // namespace mustafar::cuda
