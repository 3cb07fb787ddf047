#include "fake_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fake_cuda {

Runtime& runtime() {
  static Runtime value;
  return value;
}

void reset() {
  Runtime healthy;
  healthy.device_memory = runtime().device_memory;
  healthy.pinned_memory = runtime().pinned_memory;
  runtime() = std::move(healthy);
}

int64_t Runtime::used_bytes() const {
  int64_t bytes = 0;
  for (const auto& [pointer, size] : device_memory) bytes += size;
  return bytes;
}

int64_t Runtime::count(const std::string& call) const {
  return std::count(log.begin(), log.end(), call);
}

bool Runtime::nothing_is_left() const {
  return device_memory.empty() && pinned_memory.empty() && n_streams == 0 && n_graphs == 0 &&
         n_executables == 0 && !capturing;
}

namespace {

// Notes a call that may fail, and whether this is the one that does.
cudaError_t enter(const char* name, bool allocates = false) {
  Runtime& r = runtime();
  r.log.push_back(name);
  if (r.fail_allocations_only && !allocates) return cudaSuccess;
  const int64_t call = r.n_calls++;
  const bool fails = r.fail_allocations_only ? call >= r.fail_at : call == r.fail_at;
  if (!fails || r.fail_at < 0) return cudaSuccess;
  if (r.failed_call.empty()) r.failed_call = name;
  return r.fail_with;
}

cudaError_t allocate(const char* name, void** pointer, size_t bytes,
                     std::map<void*, int64_t>& live) {
  if (const cudaError_t status = enter(name, true)) return status;
  *pointer = std::calloc(bytes, 1);
  live[*pointer] = static_cast<int64_t>(bytes);
  return cudaSuccess;
}

cudaError_t release(void* pointer, std::map<void*, int64_t>& live) {
  if (live.erase(pointer) == 0) std::abort();  // freed twice, or never allocated
  std::free(pointer);
  return cudaSuccess;
}

template <typename Handle>
cudaError_t make(Handle* handle, int& live) {
  *handle = reinterpret_cast<Handle>(std::malloc(1));
  live++;
  return cudaSuccess;
}

template <typename Handle>
cudaError_t destroy(Handle handle, int& live) {
  std::free(handle);
  live--;
  return cudaSuccess;
}

}  // namespace
}  // namespace fake_cuda

using fake_cuda::enter;
using fake_cuda::runtime;

extern "C" {

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return enter("cudaRuntimeGetVersion");
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = runtime().driver_version;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = runtime().n_devices;
  return runtime().device_count_status;
}
cudaError_t cudaSetDevice(int) { return runtime().set_device_status; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::strcpy(p->name, "Fake GPU");
  p->major = 7;
  p->minor = 5;
  p->multiProcessorCount = 4;
  p->sharedMemPerBlockOptin = 99 << 10;
  p->totalGlobalMem = static_cast<size_t>(runtime().memory_bytes);
  return enter("cudaGetDeviceProperties");
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return runtime().kernel_status;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return enter("cudaFuncSetAttribute");
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheTest"; }
const char* cudaGetErrorString(cudaError_t) { return "made to fail"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = static_cast<size_t>(runtime().memory_bytes);
  *free = static_cast<size_t>(runtime().memory_bytes - runtime().used_bytes());
  return enter("cudaMemGetInfo");
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (runtime().used_bytes() + static_cast<int64_t>(bytes) > runtime().memory_bytes) {
    return cudaErrorMemoryAllocation;
  }
  return fake_cuda::allocate("cudaMalloc", pointer, bytes, runtime().device_memory);
}
cudaError_t cudaFree(void* pointer) { return fake_cuda::release(pointer, runtime().device_memory); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return fake_cuda::allocate("cudaMallocHost", pointer, bytes, runtime().pinned_memory);
}
cudaError_t cudaFreeHost(void* pointer) {
  return fake_cuda::release(pointer, runtime().pinned_memory);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (const cudaError_t status = enter("cudaMemcpyAsync")) return status;
  if (!runtime().capturing && bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  if (const cudaError_t status = enter("cudaMemsetAsync")) return status;
  if (!runtime().capturing) std::memset(at, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (const cudaError_t status = enter("cudaStreamCreate")) return status;
  return fake_cuda::make(stream, runtime().n_streams);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return fake_cuda::destroy(stream, runtime().n_streams);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  if (runtime().capturing) return cudaErrorStreamCaptureUnsupported;
  return enter("cudaStreamSynchronize");
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = runtime().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return enter("cudaStreamIsCapturing");
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  if (const cudaError_t status = enter("cudaStreamBeginCapture")) return status;
  runtime().capturing = true;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  const cudaError_t status = enter("cudaStreamEndCapture");
  runtime().capturing = false;
  if (status != cudaSuccess) return status;
  return fake_cuda::make(graph, runtime().n_graphs);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return fake_cuda::destroy(graph, runtime().n_graphs);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
  if (const cudaError_t status = enter("cudaGraphInstantiate")) return status;
  return fake_cuda::make(executable, runtime().n_executables);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return enter("cudaGraphLaunch"); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return fake_cuda::destroy(executable, runtime().n_executables);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return enter("launch");
}

// What nvcc's host code calls to make its kernels known and for the <<<>>> form, which is not used.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*,
                            void*, int*) {}
cudaError_t __cudaGetKernel(void**, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }

}  // extern "C"
