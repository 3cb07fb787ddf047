#include "fake_runtime.h"

#include <cuda.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace fake_cuda {

Runtime& runtime() {
  static Runtime value;
  return value;
}

void reset() {
  Runtime healthy;
  healthy.device_memory = runtime().device_memory;
  healthy.pinned_memory = runtime().pinned_memory;
  healthy.device_of = runtime().device_of;
  runtime() = std::move(healthy);
}

int64_t Runtime::used_bytes() const {
  int64_t bytes = 0;
  for (const auto& [pointer, size] : device_memory) bytes += size;
  return bytes;
}

int64_t Runtime::used_bytes(int device) const {
  int64_t bytes = 0;
  for (const auto& [pointer, size] : device_memory) {
    if (device_of.at(pointer) == device) bytes += size;
  }
  return bytes;
}

int64_t Runtime::count(const std::string& call) const {
  return std::count(log.begin(), log.end(), call);
}

bool Runtime::nothing_is_left() const {
  return device_memory.empty() && pinned_memory.empty() && n_streams == 0 && n_graphs == 0 &&
         n_executables == 0 && device_of.empty() && capturing.empty() && misuses.empty();
}

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex g_mutex;

// The calling thread's contexts, of each its device; the last is current.
thread_local std::vector<int> t_contexts;

CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
}
int device_of(CUcontext context) {
  return static_cast<int>(reinterpret_cast<intptr_t>(context) - 1);
}

// Where what is called now happens.
int current() {
  if (t_contexts.empty()) {
    runtime().n_by_default++;
    t_contexts.push_back(0);
  }
  return t_contexts.back();
}

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

// Notes a misuse unless what is used is of the current device.
cudaError_t check_device(int device, const char* name) {
  if (device == current()) return cudaSuccess;
  runtime().misuses.push_back(std::string(name) + " with what is of device " +
                              std::to_string(device) + " while device " +
                              std::to_string(current()) + " is current");
  return cudaErrorInvalidResourceHandle;
}

cudaError_t check_handle(const void* handle, const char* name) {
  if (handle == nullptr) return cudaSuccess;  // the current device's own stream
  const auto it = runtime().device_of.find(handle);
  if (it == runtime().device_of.end()) std::abort();  // released, or never made
  return check_device(it->second, name);
}

// The same of memory, if it is a device's, and that no more is used than there is.
cudaError_t check_memory(const void* at, size_t bytes, const char* name) {
  const auto& memory = runtime().device_memory;
  auto it = memory.upper_bound(const_cast<void*>(at));
  if (it == memory.begin()) return cudaSuccess;
  --it;
  const char* const begin = static_cast<const char*>(it->first);
  const char* const first = static_cast<const char*>(at);
  if (first >= begin + it->second) return cudaSuccess;
  if (first + bytes > begin + it->second) std::abort();
  return check_handle(it->first, name);
}

cudaError_t allocate(const char* name, void** pointer, size_t bytes,
                     std::map<void*, int64_t>& live) {
  const int device = current();
  if (const cudaError_t status = enter(name, true)) return status;
  *pointer = std::calloc(bytes, 1);
  live[*pointer] = static_cast<int64_t>(bytes);
  runtime().device_of[*pointer] = device;
  return cudaSuccess;
}

cudaError_t release(const char* name, void* pointer, std::map<void*, int64_t>& live) {
  if (live.erase(pointer) == 0) std::abort();  // freed twice, or never allocated
  const cudaError_t status = check_handle(pointer, name);
  runtime().device_of.erase(pointer);
  std::free(pointer);
  return status;
}

template <typename Handle>
cudaError_t make(Handle* handle, int& live) {
  *handle = reinterpret_cast<Handle>(std::malloc(1));
  runtime().device_of[*handle] = current();
  live++;
  return cudaSuccess;
}

template <typename Handle>
cudaError_t destroy(const char* name, Handle handle, int& live) {
  const cudaError_t status = check_handle(handle, name);
  runtime().device_of.erase(handle);
  std::free(handle);
  live--;
  return status;
}

bool is_capturing(cudaStream_t stream) { return runtime().capturing.count(stream) != 0; }

// What the driver is asked for by name.
CUresult primary_context(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
CUresult current_context(CUcontext* context) {
  *context = t_contexts.empty() ? nullptr : context_of(t_contexts.back());
  return CUDA_SUCCESS;
}
CUresult push_context(CUcontext context) {
  t_contexts.push_back(device_of(context));
  return CUDA_SUCCESS;
}
CUresult pop_context(CUcontext* context) {
  if (t_contexts.empty()) std::abort();
  *context = context_of(t_contexts.back());
  t_contexts.pop_back();
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace fake_cuda

using fake_cuda::check_handle;
using fake_cuda::check_memory;
using fake_cuda::current;
using fake_cuda::enter;
using fake_cuda::g_mutex;
using fake_cuda::is_capturing;
using fake_cuda::Lock;
using fake_cuda::runtime;
using fake_cuda::t_contexts;

extern "C" {

int fake_cuda_current_device() {
  const Lock lock(g_mutex);
  return current();
}
bool fake_cuda_check_device(int device, const char* what) {
  const Lock lock(g_mutex);
  return fake_cuda::check_device(device, what) == cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  const Lock lock(g_mutex);
  *version = CUDART_VERSION;
  return enter("cudaRuntimeGetVersion");
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = runtime().driver_version;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const Lock lock(g_mutex);
  const std::map<std::string, void*> known = {
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(fake_cuda::primary_context)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(fake_cuda::current_context)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(fake_cuda::push_context)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(fake_cuda::pop_context)}};
  const auto it = known.find(name);
  const bool found = it != known.end();
  *function = found ? it->second : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = runtime().n_devices;
  return runtime().device_count_status;
}
cudaError_t cudaInitDevice(int, unsigned, unsigned) { return runtime().init_device_status; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= runtime().n_devices) return cudaErrorInvalidDevice;
  if (t_contexts.empty()) t_contexts.push_back(device);
  t_contexts.back() = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  const Lock lock(g_mutex);
  *device = t_contexts.empty() ? 0 : t_contexts.back();
  return enter("cudaGetDevice");
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  const Lock lock(g_mutex);
  std::strcpy(p->name, device == 0 ? "Fake GPU" : "Another fake GPU");
  p->major = 7;
  p->minor = 5;
  p->multiProcessorCount = 4;
  p->sharedMemPerBlockOptin = 99 << 10;
  p->totalGlobalMem = static_cast<size_t>(runtime().memory_bytes);
  return enter("cudaGetDeviceProperties");
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  const Lock lock(g_mutex);
  current();
  return runtime().kernel_status;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  const Lock lock(g_mutex);
  current();
  return enter("cudaFuncSetAttribute");
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheTest"; }
const char* cudaGetErrorString(cudaError_t) { return "made to fail"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(g_mutex);
  *total = static_cast<size_t>(runtime().memory_bytes);
  *free = static_cast<size_t>(runtime().memory_bytes - runtime().used_bytes(current()));
  return enter("cudaMemGetInfo");
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const Lock lock(g_mutex);
  const int64_t used = runtime().used_bytes(current());
  if (used + static_cast<int64_t>(bytes) > runtime().memory_bytes) {
    return cudaErrorMemoryAllocation;
  }
  return fake_cuda::allocate("cudaMalloc", pointer, bytes, runtime().device_memory);
}
cudaError_t cudaFree(void* pointer) {
  const Lock lock(g_mutex);
  return fake_cuda::release("cudaFree", pointer, runtime().device_memory);
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  const Lock lock(g_mutex);
  return fake_cuda::allocate("cudaMallocHost", pointer, bytes, runtime().pinned_memory);
}
cudaError_t cudaFreeHost(void* pointer) {
  const Lock lock(g_mutex);
  return fake_cuda::release("cudaFreeHost", pointer, runtime().pinned_memory);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = check_handle(stream, "cudaMemcpyAsync")) return status;
  if (const cudaError_t status = check_memory(to, bytes, "cudaMemcpyAsync")) return status;
  if (const cudaError_t status = check_memory(from, bytes, "cudaMemcpyAsync")) return status;
  if (const cudaError_t status = enter("cudaMemcpyAsync")) return status;
  if (!is_capturing(stream) && bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = check_handle(stream, "cudaMemsetAsync")) return status;
  if (const cudaError_t status = check_memory(at, bytes, "cudaMemsetAsync")) return status;
  if (const cudaError_t status = enter("cudaMemsetAsync")) return status;
  if (!is_capturing(stream)) std::memset(at, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = enter("cudaStreamCreate")) return status;
  return fake_cuda::make(stream, runtime().n_streams);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(g_mutex);
  return fake_cuda::destroy("cudaStreamDestroy", stream, runtime().n_streams);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = check_handle(stream, "cudaStreamSynchronize")) return status;
  if (is_capturing(stream)) return cudaErrorStreamCaptureUnsupported;
  return enter("cudaStreamSynchronize");
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(g_mutex);
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return enter("cudaStreamIsCapturing");
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = check_handle(stream, "cudaStreamBeginCapture")) return status;
  if (const cudaError_t status = enter("cudaStreamBeginCapture")) return status;
  runtime().capturing.insert(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(g_mutex);
  runtime().capturing.erase(stream);
  if (const cudaError_t status = check_handle(stream, "cudaStreamEndCapture")) return status;
  if (const cudaError_t status = enter("cudaStreamEndCapture")) return status;
  return fake_cuda::make(graph, runtime().n_graphs);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(g_mutex);
  return fake_cuda::destroy("cudaGraphDestroy", graph, runtime().n_graphs);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = check_handle(graph, "cudaGraphInstantiate")) return status;
  if (const cudaError_t status = enter("cudaGraphInstantiate")) return status;
  return fake_cuda::make(executable, runtime().n_executables);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = check_handle(executable, "cudaGraphLaunch")) return status;
  if (const cudaError_t status = check_handle(stream, "cudaGraphLaunch")) return status;
  return enter("cudaGraphLaunch");
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const Lock lock(g_mutex);
  return fake_cuda::destroy("cudaGraphExecDestroy", executable, runtime().n_executables);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  const Lock lock(g_mutex);
  if (const cudaError_t status = check_handle(config->stream, "a launch")) return status;
  runtime().n_launches[current()]++;
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
