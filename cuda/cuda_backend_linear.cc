// The linear layers of the backend: which kernel takes which products, and the norms beside them.
#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/elementwise.h"

namespace mustafar::cuda {
namespace {

// Decode batches up to here go through GEMV, which reads the weights once, also where cuBLASLt is
// found: on an H100 cuBLASLt is level with GEMV at 8 rows and ahead of it at 16.
constexpr int32_t kGemvBatch = 8;
// Codes are read at a quarter or half of the bytes, and expanding them costs several times those:
// a pass of 64 rows over the codes is faster, two are not.
constexpr int32_t kQuantisedGemmBatch = 64;
constexpr int64_t kProductBytes = int64_t{32} << 20;  // cuBLASLt's scratch

LinearArgs part_alone(const LinearArgs& args, const LinearPart& part) {
  LinearArgs one = args;
  one.parts[0] = part;
  one.n_parts = 1;
  return one;
}

}  // namespace

bool CudaBackend::by_gemv(const LinearArgs& args, bool decode) const {
  if (dtype_ == DType::kF32) return true;
  if (args.parts[0].quantised()) return args.n <= kGemvBatch || args.cols % 8 != 0;
  if (!gemm_takes(args)) return true;
  return args.n <= (!decode ? 1 : cublaslt_ != nullptr ? kGemvBatch : kGemvRows);
}

bool CudaBackend::by_gemm_quantised(const LinearArgs& args) const {
  return args.parts[0].quantised() && args.n > kGemvBatch &&
         (args.n <= kQuantisedGemmBatch || dtype_ == DType::kF32) && gemm_quantised_takes(args);
}

bool CudaBackend::in_one_step(const LinearArgs& args, bool decode, CudaWorkspace& workspace) {
  if (by_gemm_quantised(args)) {
    gemm_quantised(args, workspace.product.ensure<uint8_t>(gemm_quantised_scratch_bytes(args)),
                   stream_);
  } else if (by_gemv(args, decode)) {
    gemv(args, stream_);
  } else {
    return false;
  }
  return true;
}

void CudaBackend::linear(const LinearArgs& whole, bool decode, CudaWorkspace& workspace) {
  if (whole.n == 0) return;
  const auto like_first = [&](const LinearPart& part) { return part.like(whole.parts[0]); };
  const bool alike = std::all_of(whole.parts, whole.parts + whole.n_parts, like_first);
  if (alike && in_one_step(whole, decode, workspace)) return;
  LinearArgs args = whole;
  if (args.norm != nullptr) {
    args.x = normalise(args.x, args.norm, nullptr, args.n, args.cols, workspace);
    args.norm = nullptr;
  }
  args.gated = false;
  if (alike) {
    multiply(args, workspace);
  } else {
    for (int i = 0; i < args.n_parts; i++) {
      const LinearArgs one = part_alone(args, args.parts[i]);
      if (!in_one_step(one, decode, workspace)) multiply(one, workspace);
    }
  }
  if (whole.gated) {
    silu_multiply(args.parts[0].y, args.parts[1].y, args.n * args.parts[0].rows, stream_);
  }
}

void CudaBackend::multiply(const LinearArgs& args, CudaWorkspace& workspace) {
  const bool quantised = args.parts[0].quantised();
  void* packed = workspace.packed.ensure<uint16_t>(args.n * args.cols);
  if (cublaslt_ == nullptr && !quantised) {
    gemm(args, packed, stream_);
    return;
  }
  round_to(quantised ? dtype_ : args.parts[0].dtype, args.x, args.n * args.cols, packed, stream_);
  for (int i = 0; i < args.n_parts; i++) {
    if (quantised) {
      multiply_codes(args, args.parts[i], packed, workspace);
    } else {
      multiply_values(args, args.parts[i], packed, workspace);
    }
  }
}

void CudaBackend::multiply_codes(const LinearArgs& args, const LinearPart& part, void* packed,
                                 CudaWorkspace& workspace) {
  const int64_t most = std::min(expanded_rows(args.cols), part.rows);
  void* values = workspace.expanded.ensure<uint16_t>(most * args.cols);
  for (int64_t first = 0; first < part.rows; first += most) {
    const int64_t rows = std::min(most, part.rows - first);
    expand_codes(part, args.cols, first, rows, dtype_, values, stream_);
    const float* bias = part.bias != nullptr ? part.bias + first : nullptr;
    multiply_values(args,
                    {values, dtype_, rows, bias, part.y + first, part.y_stride, part.accumulate},
                    packed, workspace);
  }
}

void CudaBackend::multiply_values(const LinearArgs& args, const LinearPart& part, void* packed,
                                  CudaWorkspace& workspace) {
  if (cublaslt_ == nullptr || !cublaslt_->multiply(part, packed, args.n, args.cols,
                                                   workspace.product.ensure<uint8_t>(kProductBytes),
                                                   kProductBytes, stream_)) {
    gemm(part_alone(args, part), packed, stream_);
  } else if (part.bias != nullptr) {
    add_bias(part.bias, part.rows, args.n, part.y, part.y_stride, stream_);
  }
}

const float* CudaBackend::normalise(const float* x, const float* weight, const int32_t* rows,
                                    int32_t n, int64_t hidden, CudaWorkspace& workspace) {
  float* out = workspace.normed.ensure<float>(n * hidden);
  rms_norm(x, rows, weight, eps_, n, hidden, out, stream_);
  return out;
}

void CudaBackend::norm_heads(QkNorm kind, const float* weight, int32_t n_heads, int32_t n_rows,
                             float* x) {
  if (kind == QkNorm::kNone) return;
  const bool alone = kind == QkNorm::kHead;
  const int64_t rows = int64_t{n_rows} * (alone ? n_heads : 1);
  const int64_t width = int64_t{head_dim_} * (alone ? 1 : n_heads);
  rms_norm(x, nullptr, weight, branch_eps_, rows, width, x, stream_);
}

void CudaBackend::add_branch(const LinearArgs& product, const float* norm, int64_t hidden,
                             bool decode, CudaWorkspace& workspace) {
  if (norm == nullptr) {
    linear(product, decode, workspace);
    return;
  }
  LinearArgs args = product;
  LinearPart& part = args.parts[0];
  float* const x = part.y;
  part.y = workspace.branch.ensure<float>(args.n * hidden);
  part.accumulate = false;
  linear(args, decode, workspace);
  rms_norm(part.y, nullptr, norm, branch_eps_, args.n, hidden, x, stream_, /*add=*/true);
}

}  // namespace mustafar::cuda
