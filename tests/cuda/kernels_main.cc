// The suites of the kernels (tests/simt) on a device. Every test is skipped, saying why, where
// there is none, and where an earlier test of the process has broken the device's context.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <utility>

#include "cuda/device.h"

namespace {

class NeedsDevice : public ::testing::EmptyTestEventListener {
 public:
  explicit NeedsDevice(std::string missing) : missing_(std::move(missing)) {}

  void OnTestStart(const ::testing::TestInfo&) override {
    if (!missing_.empty()) GTEST_SKIP() << missing_;
  }

  // A kernel's failure belongs to the test that launched it.
  void OnTestEnd(const ::testing::TestInfo& info) override {
    if (info.result()->Skipped()) return;
    try {
      mustafar::cuda::synchronize(nullptr);
    } catch (const mustafar::Error& error) {
      missing_ = std::string(info.test_suite_name()) + "." + info.name() +
                 " has left the device unusable: " + error.what();
      ADD_FAILURE() << missing_;
    }
  }

 private:
  std::string missing_;
};

std::string missing_device() {
  try {
    const mustafar::cuda::DeviceProperties device = mustafar::cuda::open_device();
    std::printf("device: %s, sm_%d, %d multiprocessors\n", device.name.c_str(),
                device.compute_capability, device.n_multiprocessors);
    return "";
  } catch (const mustafar::Error& error) {
    std::printf("no device for these tests: %s\n", error.what());
    return error.what();
  }
}

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const bool lists = ::testing::GTEST_FLAG(list_tests);
  ::testing::UnitTest::GetInstance()->listeners().Append(
      new NeedsDevice(lists ? "" : missing_device()));
  return RUN_ALL_TESTS();
}
