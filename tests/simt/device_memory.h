// Memory for the tests of the kernels, which run in two programs from one source: on the host SIMT
// harness (MUSTAFAR_SIMT) and, in a CUDA build, on the device. Either way the kernels' memory is
// apart from the host's, so that a test that forgets a copy fails in both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "cuda/device.h"
#include "mustafar/error.h"
#if defined(MUSTAFAR_SIMT)
#include "simt.h"
#endif

namespace mustafar::cuda {

#if defined(MUSTAFAR_SIMT)
constexpr bool kOnDevice = false;
#else
constexpr bool kOnDevice = true;
#endif

// The order in which the harness runs threads from here on; a device has its own.
inline void set_schedule([[maybe_unused]] uint32_t seed) {
#if defined(MUSTAFAR_SIMT)
  simt::set_seed(seed);
#endif
}

// Bytes on the device and a mirror of them on the host, copied on demand. Both begin as 0xff, a NaN
// in every type. On the harness an access past the end dies; on a device, writes around the memory
// are found by download().
class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes, const char* name = "device memory")
      : name_(name),
        bytes_(static_cast<size_t>(bytes)),
        mirror_(std::max<size_t>(bytes_, 1)),
#if defined(MUSTAFAR_SIMT)
        memory_(bytes_) {
#else
        memory_(static_cast<uint8_t*>(device_allocate(bytes + 2 * kGuard))) {
    fill_bytes(memory_, kGuardByte, bytes + 2 * kGuard, nullptr);
#endif
    poison();
  }
#if !defined(MUSTAFAR_SIMT)
  ~DeviceMemory() { device_free(memory_); }
#endif
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Where the kernels find it: aligned to 128 bytes.
  uint8_t* device() const {
#if defined(MUSTAFAR_SIMT)
    return memory_.data();
#else
    return memory_ + kGuard;
#endif
  }
  // The mirror: aligned to 128 bytes.
  uint8_t* host() { return mirror_.as<uint8_t>(); }
  const uint8_t* host() const { return mirror_.as<uint8_t>(); }
  int64_t bytes() const { return static_cast<int64_t>(bytes_); }

  void poison() {
    std::memset(host(), 0xff, bytes_);
    fill_bytes(device(), 0xff, bytes(), nullptr);
  }
  void upload() { copy_to_device(device(), host(), bytes(), nullptr); }

  // Waits for the kernels, then copies to the mirror. Throws Error where one failed or wrote around
  // the memory.
  void download() {
    copy_to_host(host(), device(), bytes(), nullptr);
    synchronize(nullptr);
#if defined(MUSTAFAR_SIMT)
    memory_.check(name_);
#else
    check_guard(memory_, "before the start");
    check_guard(device() + bytes_, "past the end");
#endif
  }

 private:
#if !defined(MUSTAFAR_SIMT)
  static constexpr int64_t kGuard = 1024;
  static constexpr int kGuardByte = 0xa5;

  void check_guard(const uint8_t* guard, const char* where) const {
    std::vector<uint8_t> bytes(kGuard);
    copy_to_host(bytes.data(), guard, kGuard, nullptr);
    synchronize(nullptr);
    if (std::all_of(bytes.begin(), bytes.end(), [](uint8_t b) { return b == kGuardByte; })) return;
    throw Error(std::string("a write ") + where + " of " + name_ + " of " + std::to_string(bytes_) +
                " bytes");
  }
#endif

  const char* name_;
  size_t bytes_;
  HostBuffer mirror_;
#if defined(MUSTAFAR_SIMT)
  simt::GuardedMemory memory_;
#else
  uint8_t* memory_;
#endif
};

// Values of one type, uploaded.
template <typename T>
class DeviceArray : public DeviceMemory {
 public:
  explicit DeviceArray(const std::vector<T>& values, const char* name = "an array")
      : DeviceArray(static_cast<int64_t>(values.size()), name) {
    if (!values.empty()) std::memcpy(host(), values.data(), values.size() * sizeof(T));
    upload();
  }
  // Poisoned.
  explicit DeviceArray(int64_t count, const char* name = "an array")
      : DeviceMemory(count * static_cast<int64_t>(sizeof(T)), name) {}

  T* device() const { return reinterpret_cast<T*>(DeviceMemory::device()); }
  T* host() { return reinterpret_cast<T*>(DeviceMemory::host()); }
};

}  // namespace mustafar::cuda
