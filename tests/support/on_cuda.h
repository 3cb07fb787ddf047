// Tests that need device "cuda": the host harness in its place, or a GPU.
#pragma once

#include <gtest/gtest.h>

#include "core/dtype.h"
#include "mustafar/error.h"
#include "support/random_model.h"

namespace mustafar::testing {

// Skips, saying why, where there is no such device.
class OnCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      random_model(small_config(), "cuda", 1, DType::kF32);
    } catch (const DeviceError& error) {
      GTEST_SKIP() << error.what();
    }
  }
};

}  // namespace mustafar::testing
