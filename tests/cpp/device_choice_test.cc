// Which backend a device name gives, and what is said where there is none.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "backend/backend.h"
#include "backend/device_name.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

ModelConfig small_config() {
  ModelConfig c;
  c.hidden_size = 32;
  c.n_heads = 2;
  c.n_kv_heads = 1;
  c.head_dim = 16;
  return c;
}

std::unique_ptr<Backend> open(const std::string& device) {
  BackendOptions options;
  options.device = device;
  options.threads = 1;
  return make_backend(small_config(), options);
}

// Why device "cuda" can't be had; empty where it can.
std::string refusal() {
  try {
    open("cuda");
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "";
}

TEST(DeviceChoice, CpuIsAlwaysThere) { EXPECT_EQ(open("cpu")->device(), "cpu"); }

TEST(DeviceChoice, AutoIsTheGpuWhereThereIsOne) {
  EXPECT_EQ(open("auto")->device(), refusal().empty() ? "cuda" : "cpu");
}

TEST(DeviceChoice, AnUnknownNameListsTheKnownOnes) {
  for (const std::string name :
       {"gpu", "", "CUDA", "cuda1", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "cuda: 1", "cuda:1x",
        "cuda:0,1", "cuda:99999999999", "cpu:0", "auto:1"}) {
    try {
      open(name);
      FAIL() << "device " << name << " was taken";
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(),
                "device: expected auto, cpu, cuda or cuda:N (the GPU of number N, from 0), got \"" +
                    name + "\"");
    }
  }
}

TEST(DeviceChoice, NamesAreReadAsTheyAreWritten) {
  for (const std::string name : {"auto", "cpu", "cuda", "cuda:1", "cuda:12"}) {
    EXPECT_EQ(DeviceName::parse(name).text(), name);
  }
  EXPECT_EQ(DeviceName::parse("cuda:0").text(), "cuda");
  EXPECT_EQ(DeviceName::parse("cuda:12").number, 12);
}

// Also where there are GPUs: none has so many.
TEST(DeviceChoice, TheRefusalNamesTheNumber) {
  try {
    open("cuda:1000");
    FAIL() << "device cuda:1000 was taken";
  } catch (const DeviceError& error) {
    EXPECT_EQ(std::string(error.what()).find("device \"cuda:1000\": "), 0u) << error.what();
  }
}

TEST(DeviceChoice, TheRefusalSaysWhatIsMissing) {
  const std::string message = refusal();
  if (message.empty()) GTEST_SKIP() << "there is a GPU";
  EXPECT_EQ(message.find("device \"cuda\": "), 0u) << message;
#if defined(MUSTAFAR_TEST_CUDA)
  const bool driver = message.find("libcuda.so.1") != std::string::npos;
  const bool gpu = message.find("finds no NVIDIA GPU") != std::string::npos;
  EXPECT_TRUE(driver || gpu || message.find("can't be used") != std::string::npos) << message;
#else
  EXPECT_NE(message.find("this build has no CUDA; rebuild with MUSTAFAR_CUDA=ON"),
            std::string::npos)
      << message;
#endif
}

}  // namespace
}  // namespace mustafar
