// Products by the cuBLASLt that is found on this machine.
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>

#include "cuda/cublaslt.h"
#include "linear_fixture.h"

namespace mustafar::cuda {
namespace {

constexpr DType kF16 = DType::kF16, kBF16 = DType::kBF16;

class CublasLtTest : public ::testing::TestWithParam<LinearShape> {
 protected:
  void SetUp() override {
    library_ = CublasLt::open();  // throws where a chosen library can't be used
    if (library_ == nullptr) GTEST_SKIP() << "no cuBLASLt was found; MUSTAFAR_CUBLASLT names one";
    RecordProperty("cublaslt", library_->version());
  }

  std::unique_ptr<CublasLt> library_;
};

TEST_P(CublasLtTest, EqualsThePlainProduct) {
  const LinearShape& shape = GetParam();
  std::printf("cuBLASLt %s\n", library_->version().c_str());
  check_linear(shape, true, kTensorCoreError, [&](const LinearArgs& args) {
    const int64_t count = shape.n * shape.cols;
    DeviceMemory packed(dtype_bytes(shape.dtype, count), "packed x");
    DeviceMemory workspace(int64_t{8} << 20, "the workspace");
    round_to(shape.dtype, args.x, count, packed.device(), nullptr);
    for (int i = 0; i < args.n_parts; i++) {
      const LinearPart& part = args.parts[i];
      ASSERT_TRUE(library_->multiply(part, packed.device(), args.n, args.cols, workspace.device(),
                                     workspace.bytes(), nullptr));
      if (part.bias != nullptr) {
        add_bias(part.bias, part.rows, args.n, part.y, part.y_stride, nullptr);
      }
    }
    packed.download();
    workspace.download();
  });
}

INSTANTIATE_TEST_SUITE_P(Shapes, CublasLtTest,
                         ::testing::Values(LinearShape{kBF16, 9, 256, 64, 512, false, false},
                                           LinearShape{kF16, 64, 128, 64, 256, false, true},
                                           LinearShape{kBF16, 200, 520, 136, 4096, true, false},
                                           LinearShape{kF16, 513, 264, 8, 2048, true, true}),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace mustafar::cuda
