// A cuBLASLt for tests, by its documented interface: column-major products on host memory.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "core/dtype.h"

using mustafar::DType;

namespace {

struct Layout {
  DType dtype;
  int64_t rows, cols, stride;
};
struct Product {
  bool transposed_a = false;
};
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

constexpr uint64_t kAlgorithm = 0x5eed;
constexpr int kInvalid = 7, kUnsupported = 15;  // cublasStatus_t

}  // namespace

extern "C" {

// The program's (fake_runtime.h).
int fake_cuda_current_device();
bool fake_cuda_check_device(int device, const char* what);

int cublasLtCreate(void** handle) {
  if (std::getenv("FAKE_CUBLASLT_BROKEN") != nullptr) return 1;  // not initialised
  *handle = new int(fake_cuda_current_device());
  return 0;
}
int cublasLtDestroy(void* handle) {
  int* const device = static_cast<int*>(handle);
  fake_cuda_check_device(*device, "cublasLtDestroy");
  delete device;
  return 0;
}
size_t cublasLtGetVersion() { return 130205; }

int cublasLtMatmulDescCreate(void** product, int compute_type, int scale_type) {
  if (compute_type != 68 || scale_type != 0) return kInvalid;  // in f32
  *product = new Product;
  return 0;
}
int cublasLtMatmulDescDestroy(void* product) {
  delete static_cast<Product*>(product);
  return 0;
}
int cublasLtMatmulDescSetAttribute(void* product, int attribute, const void* value, size_t bytes) {
  if (attribute != 3 || bytes != sizeof(int)) return kInvalid;  // TRANSA
  static_cast<Product*>(product)->transposed_a = *static_cast<const int*>(value) == 1;
  return 0;
}

int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols,
                               int64_t stride) {
  if (stride < static_cast<int64_t>(rows)) return kInvalid;
  const DType dtype = type == 0 ? DType::kF32 : type == 2 ? DType::kF16 : DType::kBF16;
  if (type != 0 && type != 2 && type != 14) return kInvalid;
  *layout = new Layout{dtype, static_cast<int64_t>(rows), static_cast<int64_t>(cols), stride};
  return 0;
}
int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return 0;
}

int cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = std::malloc(1);
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void* preference) {
  std::free(preference);
  return 0;
}
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, size_t bytes) {
  return attribute == 1 && bytes == sizeof(uint64_t) ? 0 : kInvalid;  // MAX_WORKSPACE_BYTES
}

// No kernel where A has 7 columns.
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void* a, void*, void*, void*, void*, int wanted,
                                   void* results, int* found) {
  *found = 0;
  if (static_cast<Layout*>(a)->cols == 7) return kUnsupported;
  if (wanted < 1) return kInvalid;
  Heuristic* const heuristic = static_cast<Heuristic*>(results);
  heuristic->algorithm[0] = kAlgorithm;
  heuristic->state = 0;
  *found = 1;
  return 0;
}

// D = alpha op(A) B + beta C.
int cublasLtMatmul(void* handle, void* product, const void* alpha, const void* a, void* a_layout,
                   const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                   void* d, void* d_layout, const void* algorithm, void*, size_t, void*) {
  if (!fake_cuda_check_device(*static_cast<int*>(handle), "cublasLtMatmul")) return kInvalid;
  if (*static_cast<const uint64_t*>(algorithm) != kAlgorithm) return kInvalid;
  const Layout &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout),
               &lc = *static_cast<Layout*>(c_layout), &ld = *static_cast<Layout*>(d_layout);
  const bool transposed = static_cast<Product*>(product)->transposed_a;
  const int64_t m = transposed ? la.cols : la.rows, depth = transposed ? la.rows : la.cols;
  if (lb.rows != depth || ld.rows != m || ld.cols != lb.cols || lc.rows != m) return kInvalid;
  for (int64_t j = 0; j < ld.cols; j++) {
    for (int64_t i = 0; i < m; i++) {
      float sum = 0;
      for (int64_t k = 0; k < depth; k++) {
        sum +=
            mustafar::load_float(a, la.dtype, transposed ? k + i * la.stride : i + k * la.stride) *
            mustafar::load_float(b, lb.dtype, k + j * lb.stride);
      }
      const float before = mustafar::load_float(c, lc.dtype, i + j * lc.stride);
      const float scaled = *static_cast<const float*>(beta);
      mustafar::store_float(
          d, ld.dtype, i + j * ld.stride,
          *static_cast<const float*>(alpha) * sum + (scaled == 0.0f ? 0.0f : scaled * before));
    }
  }
  return 0;
}

}  // extern "C"
