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

// Whether one kernel multiplies by all matrices.
bool alike(const LinearArgs& args) {
  return std::all_of(args.parts, args.parts + args.n_parts,
                     [&](const LinearPart& part) { return part.like(args.parts[0]); });
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
  const bool together = alike(whole);
  if (together && in_one_step(whole, decode, workspace)) return;
  LinearArgs args = whole;
  args.norm = nullptr;
  args.gated = false;
  if (whole.norm != nullptr && together) {
    void* const rounded = workspace.packed.ensure<uint16_t>(args.n * args.cols);
    rms_norm_rounded(args.x, whole.norm, eps_, args.n, args.cols, operand_dtype(args.parts[0]),
                     rounded, stream_);
    args.rounded = rounded;
  } else if (whole.norm != nullptr) {
    args.x = normalise(args.x, whole.norm, nullptr, args.n, args.cols, workspace);
  }
  if (together) {
    multiply(args, workspace);
  } else {
    for (int i = 0; i < args.n_parts; i++) {
      const LinearArgs one = part_alone(args, args.parts[i]);
      if (!in_one_step(one, decode, workspace)) multiply(one, workspace);
    }
  }
  if (whole.gated) {
    silu_multiply(args.parts[0].y, args.parts[1].y, args.n * args.parts[0].rows, DType::kF32,
                  args.parts[0].y, stream_);
  }
}

bool CudaBackend::by_multiply(const LinearArgs& args, bool decode) const {
  return alike(args) && !by_gemm_quantised(args) && !by_gemv(args, decode);
}

DType CudaBackend::operand_dtype(const LinearPart& part) const {
  return part.quantised() ? dtype_ : part.dtype;
}

void CudaBackend::multiply(const LinearArgs& given, CudaWorkspace& workspace) {
  LinearArgs args = given;
  if (args.rounded == nullptr) {
    void* const packed = workspace.packed.ensure<uint16_t>(args.n * args.cols);
    round_to(operand_dtype(args.parts[0]), args.x, args.n * args.cols, packed, stream_);
    args.rounded = packed;
  }
  for (int i = 0; i < args.n_parts; i++) {
    if (args.parts[i].quantised()) {
      multiply_codes(args, args.parts[i], workspace);
    } else {
      multiply_values(args, args.parts[i], workspace);
    }
  }
}

void CudaBackend::multiply_codes(const LinearArgs& args, const LinearPart& part,
                                 CudaWorkspace& workspace) {
  const int64_t most = std::min(expanded_rows(args.cols), part.rows);
  void* values = workspace.expanded.ensure<uint16_t>(most * args.cols);
  for (int64_t first = 0; first < part.rows; first += most) {
    const int64_t rows = std::min(most, part.rows - first);
    expand_codes(part, args.cols, first, rows, dtype_, values, stream_);
    const float* bias = part.bias != nullptr ? part.bias + first : nullptr;
    multiply_values(args,
                    {values, dtype_, rows, bias, part.y + first, part.y_stride, part.accumulate},
                    workspace);
  }
}

void CudaBackend::multiply_values(const LinearArgs& args, const LinearPart& part,
                                  CudaWorkspace& workspace) {
  if (cublaslt_ == nullptr || !cublaslt_->multiply(part, args.rounded, args.n, args.cols,
                                                   workspace.product.ensure<uint8_t>(kProductBytes),
                                                   kProductBytes, stream_)) {
    gemm(part_alone(args, part), stream_);
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
