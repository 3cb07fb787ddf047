// Device scratch of one call in flight, and what the host sends along with it.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "backend/backend.h"
#include "cuda/buffer.h"
#include "cuda/compress.h"

namespace mustafar::cuda {

// An array on the device that follows one on the host; sent only where the bytes have changed.
template <typename T>
class MirroredArray {
  static_assert(std::has_unique_object_representations_v<T>, "padding would differ at random");

 public:
  const T* send(std::span<const T> values, Stream stream) {
    const size_t bytes = values.size_bytes();
    if (bytes == sent_.size() && std::memcmp(sent_.data(), values.data(), bytes) == 0) {
      return static_cast<const T*>(device_.data());
    }
    T* const device = device_.ensure<T>(static_cast<int64_t>(values.size()));
    copy_to_device(device, values.data(), static_cast<int64_t>(bytes), stream);
    sent_.resize(bytes);
    std::memcpy(sent_.data(), values.data(), bytes);
    return device;
  }
  const void* data() const { return device_.data(); }
  int64_t bytes() const { return device_.bytes(); }

 private:
  std::vector<uint8_t> sent_;
  DeviceBuffer device_;
};

// Host memory that a copy from the current device may end in after the workspace that asked for it
// is gone.
class PinnedFlag {
 public:
  PinnedFlag() : value_(static_cast<int32_t*>(pinned_allocate(sizeof(int32_t)))) {}
  ~PinnedFlag() {
    const DeviceScope scope(device_, std::nothrow);
    pinned_free(value_);
  }
  PinnedFlag(const PinnedFlag&) = delete;
  PinnedFlag& operator=(const PinnedFlag&) = delete;
  int32_t* value() const { return value_; }

 private:
  const int32_t device_ = current_device();
  int32_t* value_;
};

// Made, and used, while its device is current; destroyed by any thread.
class CudaWorkspace final : public Workspace {
 public:
  int64_t bytes() const override {
    int64_t total = sequences.bytes() + commits.bytes() + rows.bytes() + bad_row.bytes();
    total += top_scratch.bytes() + top.bytes();
    for (const DeviceBuffer* buffer : buffers()) total += buffer->bytes();
    return total;
  }
  // Where everything is that a decode step uses: a recorded step is good while none has moved.
  void append_addresses(std::vector<const void*>& out) const {
    out.push_back(sequences.data());
    for (const DeviceBuffer* buffer : buffers()) out.push_back(buffer->data());
  }

  DeviceBuffer normed, keys, values, gate, up;  // f32 activations
  DeviceBuffer branch;                          // what a norm goes over before it is added to x
  DeviceBuffer packed;                          // activations in the weights' type
  DeviceBuffer partials;                        // of attention
  DeviceBuffer expanded;                        // a part of a matrix of codes as values
  DeviceBuffer product;                         // scratch of cuBLASLt and gemm_quantised
  DeviceBuffer top_scratch, top;                // of top_logits
  MirroredArray<SequenceView> sequences;
  MirroredArray<CommitView> commits;
  MirroredArray<int32_t> rows;
  DeviceBuffer bad_row;  // CompressArgs::bad_row
  std::shared_ptr<PinnedFlag> bad_row_host = std::make_shared<PinnedFlag>();

 private:
  std::array<const DeviceBuffer*, 10> buffers() const {
    return std::to_array<const DeviceBuffer*>(
        {&normed, &keys, &values, &gate, &up, &branch, &packed, &partials, &expanded, &product});
  }
};

}  // namespace mustafar::cuda
