// Owned device memory.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

#include "cuda/device.h"

namespace mustafar::cuda {

// Grows to what the largest call so far needed; what it held is lost when it grows. On the device
// that is current when it grows; destroyed by any thread, whatever is current there.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer() { release(); }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        device_(other.device_) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(device_, other.device_);
    return *this;
  }

  template <typename T>
  T* ensure(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > bytes_) {
      release();
      device_ = current_device();
      data_ = device_allocate(bytes);
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void release() noexcept {
    if (data_ == nullptr) return;
    const DeviceScope scope(device_, std::nothrow);
    device_free(data_);
    data_ = nullptr;
    bytes_ = 0;
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
  int32_t device_ = 0;
};

}  // namespace mustafar::cuda
