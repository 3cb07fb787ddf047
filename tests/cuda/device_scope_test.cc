// How a thread enters a device and leaves it: over the fake runtime, and on a device, where one is
// enough to see that CUDA's own threads find what ours leave.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "cuda/device.h"
#include "support/on_a_thread.h"
#if defined(MUSTAFAR_FAKE_CUBLASLT)
#include "fake_runtime.h"
#endif

namespace mustafar::cuda {
namespace {

using testing::on_a_thread;

class DeviceScopeTest : public ::testing::Test {
 protected:
#if defined(MUSTAFAR_FAKE_CUBLASLT)
  void SetUp() override { fake_cuda::reset(); }
  void TearDown() override { EXPECT_TRUE(fake_cuda::runtime().nothing_is_left()); }
#endif

  // The calling thread's, by the driver; null where it has none.
  static CUcontext context() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    EXPECT_EQ(cudaGetDriverEntryPointByVersion("cuCtxGetCurrent", &found, 12000, cudaEnableDefault,
                                               &result),
              cudaSuccess);
    CUcontext current = nullptr;
    EXPECT_EQ(reinterpret_cast<CUresult (*)(CUcontext*)>(found)(&current), CUDA_SUCCESS);
    return current;
  }

  // Memory, a stream and a copy there and back.
  static void work() {
    const Stream stream = make_stream();
    void* const memory = device_allocate(100);
    const uint8_t sent = 7;
    uint8_t received = 0;
    copy_to_device(memory, &sent, 1, stream);
    copy_to_host(&received, memory, 1, stream);
    synchronize(stream);
    EXPECT_EQ(received, sent);
    device_free(memory);
    destroy_stream(stream);
  }
};

TEST_F(DeviceScopeTest, LeavesAThreadWithoutADevice) {
  on_a_thread([] {
    EXPECT_EQ(context(), nullptr);
    {
      const DeviceScope scope(0);
      EXPECT_NE(context(), nullptr);
      EXPECT_EQ(current_device(), 0);
      work();
    }
    EXPECT_EQ(context(), nullptr);
  });
}

TEST_F(DeviceScopeTest, LeavesTheDeviceThatAProgramChose) {
  on_a_thread([] {
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    const CUcontext chosen = context();
    ASSERT_NE(chosen, nullptr);
    {
      const DeviceScope scope(0);
      EXPECT_EQ(context(), chosen) << "the device's primary context";
      const DeviceScope nested(0);
      work();
    }
    EXPECT_EQ(context(), chosen);
    EXPECT_EQ(current_device(), 0);
    work();
  });
}

}  // namespace
}  // namespace mustafar::cuda
