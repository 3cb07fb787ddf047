// cuBLASLt, opened at run time where it is found: beside the toolkit, in PyPI's nvidia-cublas, or
// already loaded by PyTorch. Its own headers are not needed to build.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cuda/device.h"
#include "cuda/linear.h"

namespace mustafar::cuda {

// Of the device that is current when it is opened, which is to be so in multiply, too.
class CublasLt {
 public:
  // Null where no library is found that has the interface and starts on this device.
  // MUSTAFAR_CUBLASLT names a file to open instead of the usual ones, and Error says why it can't
  // be used; "off" opens none.
  static std::unique_ptr<CublasLt> open();
  virtual ~CublasLt() = default;

  virtual std::string version() const = 0;

  // y [n][y_stride] (+)= x [n][cols] W^T of one part without its bias; x in the weights' type.
  // False where the library has no kernel for the shape.
  virtual bool multiply(const LinearPart& part, const void* x, int32_t n, int64_t cols,
                        void* workspace, int64_t workspace_bytes, Stream stream) = 0;
};

}  // namespace mustafar::cuda
