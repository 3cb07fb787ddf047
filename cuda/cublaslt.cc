#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <new>
#include <tuple>
#include <vector>

#include "mustafar/error.h"

namespace mustafar::cuda {
namespace {

// The part of cublasLt.h that is used, as its documentation gives it.
using Handle = void*;
using Descriptor = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
constexpr int kR32F = 0, kR16F = 2, kR16BF = 14;  // cudaDataType_t
constexpr int kCompute32F = 68;                   // cublasComputeType_t
constexpr int kTransposeA = 3;                    // cublasLtMatmulDescAttributes_t
constexpr int kMaxWorkspace = 1;                  // cublasLtMatmulPreferenceAttributes_t
constexpr int kTransposed = 1;                    // cublasOperation_t

struct Functions {
  int (*create)(Handle*);
  int (*destroy)(Handle);
  size_t (*version)();
  int (*desc_create)(Descriptor*, int, int);
  int (*desc_destroy)(Descriptor);
  int (*desc_set)(Descriptor, int, const void*, size_t);
  int (*layout_create)(Descriptor*, int, uint64_t, uint64_t, int64_t);
  int (*layout_destroy)(Descriptor);
  int (*preference_create)(Descriptor*);
  int (*preference_destroy)(Descriptor);
  int (*preference_set)(Descriptor, int, const void*, size_t);
  int (*heuristic)(Handle, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor,
                   int, Heuristic*, int*);
  int (*matmul)(Handle, Descriptor, const void*, const void*, Descriptor, const void*, Descriptor,
                const void*, const void*, Descriptor, void*, Descriptor, const Algorithm*, void*,
                size_t, Stream);
};

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, Functions& f) {
  return find(library, "cublasLtCreate", f.create) && find(library, "cublasLtDestroy", f.destroy) &&
         find(library, "cublasLtGetVersion", f.version) &&
         find(library, "cublasLtMatmulDescCreate", f.desc_create) &&
         find(library, "cublasLtMatmulDescDestroy", f.desc_destroy) &&
         find(library, "cublasLtMatmulDescSetAttribute", f.desc_set) &&
         find(library, "cublasLtMatrixLayoutCreate", f.layout_create) &&
         find(library, "cublasLtMatrixLayoutDestroy", f.layout_destroy) &&
         find(library, "cublasLtMatmulPreferenceCreate", f.preference_create) &&
         find(library, "cublasLtMatmulPreferenceDestroy", f.preference_destroy) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", f.preference_set) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", f.heuristic) &&
         find(library, "cublasLtMatmul", f.matmul);
}

void check(int status, const char* what) {
  if (status != 0) {
    throw Error(std::string("cuBLASLt: ") + what + " failed with status " + std::to_string(status));
  }
}

// Destroys what it holds when it goes out of scope.
struct Owned {
  Descriptor value = nullptr;
  int (*destroy)(Descriptor);
  explicit Owned(int (*destroy_with)(Descriptor)) : destroy(destroy_with) {}
  ~Owned() {
    if (value != nullptr) destroy(value);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};

// In the library's column-major terms D [rows][n] = W^T [rows][cols] x [cols][n].
struct Plan {
  explicit Plan(const Functions& f)
      : product(f.desc_destroy),
        weights(f.layout_destroy),
        x(f.layout_destroy),
        y(f.layout_destroy) {}
  Owned product, weights, x, y;
  bool exists = false;
  Algorithm algorithm{};
};

class LoadedCublasLt final : public CublasLt {
 public:
  explicit LoadedCublasLt(const Functions& functions) : f_(functions) {
    check(f_.create(&handle_), "cublasLtCreate");
  }
  ~LoadedCublasLt() override {
    const DeviceScope scope(device_, std::nothrow);
    plans_.clear();
    f_.destroy(handle_);
  }

  std::string version() const override {
    const size_t v = f_.version();
    return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." +
           std::to_string(v % 100);
  }

  bool multiply(const LinearPart& part, const void* x, int32_t n, int64_t cols, void* workspace,
                int64_t workspace_bytes, Stream stream) override {
    const Plan& plan = plan_for(part, n, cols, workspace_bytes);
    if (!plan.exists) return false;
    const float one = 1.0f, beta = part.accumulate ? 1.0f : 0.0f;
    check(f_.matmul(handle_, plan.product.value, &one, part.weights, plan.weights.value, x,
                    plan.x.value, &beta, part.y, plan.y.value, part.y, plan.y.value,
                    &plan.algorithm, workspace, static_cast<size_t>(workspace_bytes), stream),
          "cublasLtMatmul");
    return true;
  }

 private:
  using Key = std::tuple<DType, int64_t, int64_t, int32_t, int64_t, int64_t>;

  const Plan& plan_for(const LinearPart& part, int32_t n, int64_t cols, int64_t workspace_bytes) {
    const Key key{part.dtype, part.rows, cols, n, part.y_stride, workspace_bytes};
    const auto it = plans_.find(key);
    if (it != plans_.end()) return *it->second;
    auto plan = std::make_unique<Plan>(f_);
    const int type = part.dtype == DType::kF16 ? kR16F : kR16BF;
    const uint64_t rows = static_cast<uint64_t>(part.rows), depth = static_cast<uint64_t>(cols);
    check(f_.desc_create(&plan->product.value, kCompute32F, kR32F), "cublasLtMatmulDescCreate");
    check(f_.desc_set(plan->product.value, kTransposeA, &kTransposed, sizeof kTransposed),
          "cublasLtMatmulDescSetAttribute");
    check(f_.layout_create(&plan->weights.value, type, depth, rows, cols),
          "cublasLtMatrixLayoutCreate");
    check(f_.layout_create(&plan->x.value, type, depth, static_cast<uint64_t>(n), cols),
          "cublasLtMatrixLayoutCreate");
    check(f_.layout_create(&plan->y.value, kR32F, rows, static_cast<uint64_t>(n), part.y_stride),
          "cublasLtMatrixLayoutCreate");
    Owned preference(f_.preference_destroy);
    check(f_.preference_create(&preference.value), "cublasLtMatmulPreferenceCreate");
    const uint64_t limit = static_cast<uint64_t>(workspace_bytes);
    check(f_.preference_set(preference.value, kMaxWorkspace, &limit, sizeof limit),
          "cublasLtMatmulPreferenceSetAttribute");
    Heuristic heuristic{};
    int found = 0;
    const int status =
        f_.heuristic(handle_, plan->product.value, plan->weights.value, plan->x.value,
                     plan->y.value, plan->y.value, preference.value, 1, &heuristic, &found);
    plan->exists = status == 0 && found == 1 && heuristic.state == 0;
    plan->algorithm = heuristic.algorithm;
    return *plans_.emplace(key, std::move(plan)).first->second;
  }

  Functions f_;
  const int32_t device_ = current_device();
  Handle handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

// Where Python's packages have it, below a site-packages folder: PyPI's nvidia-cublas, and what
// PyTorch brings along.
void append_packages(const std::filesystem::path& packages, std::vector<std::string>& files) {
  files.push_back(packages / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13");
  files.push_back(packages / "nvidia" / "cublas" / "lib" / "libcublasLt.so.12");
}

// The same for every Python of an environment.
void append_environment(const std::filesystem::path& environment, std::vector<std::string>& files) {
  std::error_code error;
  for (const auto& python : std::filesystem::directory_iterator(environment / "lib", error)) {
    if (python.path().filename().string().rfind("python", 0) != 0) continue;
    append_packages(python.path() / "site-packages", files);
  }
}

// Files to try, the likeliest first. A name without a folder is also found where the process has
// it loaded already, as it has once PyTorch is imported.
std::vector<std::string> candidates() {
  std::vector<std::string> files = {"libcublasLt.so.13", "libcublasLt.so.12"};
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* home = std::getenv(name)) {
      files.push_back(std::string(home) + "/lib64/libcublasLt.so");
    }
  }
  files.push_back("/usr/local/cuda/lib64/libcublasLt.so");
  // What this code was loaded from: site-packages/mustafar/_core.so, or a command in bin/.
  Dl_info here{};
  if (dladdr(reinterpret_cast<const void*>(&append_packages), &here) != 0) {
    std::error_code error;
    std::filesystem::path file = std::filesystem::canonical(here.dli_fname, error);
    // Of a command it is the name that it was called by, which may be without its folder.
    if (error) file = std::filesystem::canonical("/proc/self/exe", error);
    if (!error) {
      append_packages(file.parent_path().parent_path(), files);
      append_environment(file.parent_path().parent_path(), files);
    }
  }
  if (const char* environment = std::getenv("VIRTUAL_ENV")) append_environment(environment, files);
  return files;
}

// Throws Error saying why the file can't be used.
std::unique_ptr<CublasLt> open_file(const std::string& file) {
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Error(std::string("cuBLASLt: ") + dlerror());
  Functions functions{};
  if (!find_all(library, functions)) {
    dlclose(library);
    throw Error("cuBLASLt: " + file + " lacks a function that is needed");
  }
  return std::make_unique<LoadedCublasLt>(functions);
}

}  // namespace

std::unique_ptr<CublasLt> CublasLt::open() {
  if (const char* chosen = std::getenv("MUSTAFAR_CUBLASLT")) {
    if (std::string(chosen) == "off") return nullptr;
    return open_file(chosen);
  }
  for (const std::string& file : candidates()) {
    try {
      return open_file(file);
    } catch (const Error&) {  // the next one may do
    }
  }
  return nullptr;
}

}  // namespace mustafar::cuda
