// cuda/device.h on the CUDA runtime. Compiled by the host compiler.
//
// Every call is checked but those that release: nothing could be done about their failing, and an
// error that stays comes back from the next call.
//
// A device's context is entered with the driver's calls: cudaSetDevice back to the device that was
// current before would make a context there, some hundred MiB, if nobody had used it yet.
#include "cuda/device.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "backend/device_name.h"
#include "cuda/architectures.h"

namespace mustafar::cuda {
namespace {

void check_call(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorName(status) + ", " +
              cudaGetErrorString(status));
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The part of the driver's interface that is used; it is not linked, as it may be missing.
struct Driver {
  CUresult (*primary_context)(CUcontext*, CUdevice);
  CUresult (*current)(CUcontext*);
  CUresult (*push)(CUcontext);
  CUresult (*pop)(CUcontext*);
};

template <typename Function>
void find(const char* name, Function& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  check_call(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result),
             "cudaGetDriverEntryPointByVersion");
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw Error(std::string("CUDA: the driver has no ") + name);
  }
  function = reinterpret_cast<Function>(found);
}

const Driver& driver() {
  static const Driver functions = [] {
    Driver d{};
    find("cuDevicePrimaryCtxRetain", d.primary_context);
    find("cuCtxGetCurrent", d.current);
    find("cuCtxPushCurrent", d.push);
    find("cuCtxPopCurrent", d.pop);
    return d;
  }();
  return functions;
}

void check_driver(CUresult status, const char* what) {
  if (status == CUDA_SUCCESS) return;
  throw Error(std::string("CUDA: ") + what + " failed with CUresult " + std::to_string(status));
}

// Contexts of used devices, by number; they live as long as the process.
struct Contexts {
  std::mutex mutex;
  std::map<int32_t, CUcontext> of_device;
};

Contexts& contexts() {
  static Contexts& all = *new Contexts;  // memory may be released after all that is static
  return all;
}

// Makes it where this is the first use of the device. Throws Error.
CUcontext context_of(int32_t device) {
  Contexts& all = contexts();
  const std::lock_guard lock(all.mutex);
  const auto it = all.of_device.find(device);
  if (it != all.of_device.end()) return it->second;
  CUcontext context = nullptr;
  check_driver(driver().primary_context(&context, device), "cuDevicePrimaryCtxRetain");
  all.of_device.emplace(device, context);
  return context;
}

// Whether it was not current already, and is to be left.
bool enter(int32_t device) {
  const CUcontext context = context_of(device);
  CUcontext current = nullptr;
  check_driver(driver().current(&current), "cuCtxGetCurrent");
  if (current == context) return false;
  check_driver(driver().push(context), "cuCtxPushCurrent");
  return true;
}

}  // namespace

DeviceScope::DeviceScope(int32_t device) : entered_(enter(device)) {}

DeviceScope::DeviceScope(int32_t device, std::nothrow_t) noexcept {
  try {
    entered_ = enter(device);
  } catch (const std::exception&) {  // as said
  }
}

DeviceScope::~DeviceScope() {
  CUcontext left = nullptr;
  if (entered_) driver().pop(&left);
}

int32_t current_device() {
  CUcontext current = nullptr;
  check_driver(driver().current(&current), "cuCtxGetCurrent");
  {
    Contexts& all = contexts();
    const std::lock_guard lock(all.mutex);
    for (const auto& [device, context] : all.of_device) {
      if (context == current) return device;
    }
  }
  int device = 0;  // nobody of ours has been there
  check_call(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

const DeviceProperties& device_properties() {
  static std::mutex mutex;
  static std::map<int32_t, DeviceProperties> known;
  const int32_t device = current_device();
  const std::lock_guard lock(mutex);
  const auto it = known.find(device);
  if (it != known.end()) return it->second;
  return known.emplace(device, open_device(device)).first->second;
}

DeviceProperties open_device(int32_t device) {
  const std::string prefix =
      "device \"" + DeviceName{DeviceName::Kind::kCuda, device}.text() + "\": ";
  int driver = 0, runtime = 0, count = 0;
  check_call(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    throw DeviceError(
        prefix + "the NVIDIA driver (libcuda.so.1) was not found; this build needs one for CUDA " +
        version_text(runtime) + " or newer");
  }
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    throw DeviceError(prefix + "the NVIDIA driver (libcuda.so.1) supports CUDA " +
                      version_text(driver) + ", this build needs " + version_text(runtime) +
                      " or newer");
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    throw DeviceError(prefix +
                      "the driver finds no NVIDIA GPU (is one installed, and not hidden by "
                      "CUDA_VISIBLE_DEVICES?)");
  }
  if (status == cudaSuccess && device >= count) {
    throw DeviceError(prefix + "the driver finds " + std::to_string(count) +
                      (count == 1 ? " NVIDIA GPU" : " NVIDIA GPUs") +
                      ", numbered from 0 (are others hidden by CUDA_VISIBLE_DEVICES?)");
  }
  // Makes the context: the first call that needs the device itself.
  if (status == cudaSuccess) status = cudaInitDevice(device, 0, 0);
  if (status != cudaSuccess) {
    throw DeviceError(prefix + "the GPU can't be used: " + cudaGetErrorName(status) + ", " +
                      cudaGetErrorString(status));
  }
  const DeviceScope scope(device);
  cudaDeviceProp p{};
  check_call(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  if (!has_code_for_device()) {
    throw DeviceError(prefix + "this build has no code for " + std::string(p.name) + " (sm_" +
                      std::to_string(p.major) + std::to_string(p.minor) + "); it was built for " +
                      MUSTAFAR_CUDA_ARCHITECTURES);
  }
  DeviceProperties properties;
  properties.name = p.name;
  properties.compute_capability = 10 * p.major + p.minor;
  properties.n_multiprocessors = p.multiProcessorCount;
  properties.max_shared_bytes = static_cast<int32_t>(p.sharedMemPerBlockOptin);
  properties.memory_bytes = static_cast<int64_t>(p.totalGlobalMem);
  return properties;
}

void* device_allocate(int64_t bytes) {
  void* pointer = nullptr;
  const cudaError_t status = cudaMalloc(&pointer, static_cast<size_t>(bytes > 0 ? bytes : 1));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // an allocation may fail without harm to what follows
    throw OutOfMemory("CUDA: can't allocate " + std::to_string(bytes) +
                      " bytes of device memory, " + std::to_string(device_available_bytes()) +
                      " are free");
  }
  check_call(status, "cudaMalloc");
  return pointer;
}

void device_free(void* pointer) noexcept {
  if (pointer != nullptr) cudaFree(pointer);
}

void* pinned_allocate(int64_t bytes) {
  void* pointer = nullptr;
  const cudaError_t status = cudaMallocHost(&pointer, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw OutOfMemory("CUDA: can't allocate " + std::to_string(bytes) +
                      " bytes of pinned host memory");
  }
  check_call(status, "cudaMallocHost");
  return pointer;
}

void pinned_free(void* pointer) noexcept {
  if (pointer != nullptr) cudaFreeHost(pointer);
}

int64_t device_available_bytes() {
  size_t free = 0, total = 0;
  check_call(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(free);
}

Stream make_stream() {
  cudaStream_t stream = nullptr;
  check_call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

void destroy_stream(Stream stream) noexcept {
  if (stream != nullptr) cudaStreamDestroy(stream);
}

void synchronize(Stream stream) { check_call(cudaStreamSynchronize(stream), "the device"); }

void synchronize_unless_capturing(Stream stream, const char* what) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_call(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusNone) check_call(cudaStreamSynchronize(stream), what);
}

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  check_call(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream),
             "copy to the device");
}

void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream) {
  check_call(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream),
             "copy from the device");
}

void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) {
  check_call(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
      "copy on the device");
}

void fill_bytes(void* at, int value, int64_t bytes, Stream stream) {
  check_call(cudaMemsetAsync(at, value, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
}

Graph record_graph(Stream stream, const std::function<void()>& body) {
  check_call(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  check_call(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check_call(status, "cudaGraphInstantiate");
  return executable;
}

void run_graph(Graph graph, Stream stream) {
  check_call(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
}

void destroy_graph(Graph graph) noexcept {
  if (graph != nullptr) cudaGraphExecDestroy(graph);
}

}  // namespace mustafar::cuda
