// The logits after a sequence's last token, wherever they are.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace mustafar {

// One of three things is known of them:
//   nothing                  before the first token, and after a rewind;
//   all of them, on the host;
//   the largest, on the host while the whole row stays on the device, where the next call
//                            overwrites it: until then it can be fetched.
// A call writes into room() or leaves its row on the device, and only what is set once it has
// succeeded replaces what is known.
class NextLogits {
 public:
  // Whether `needed` of the largest logits (0: all) can come from the device by themselves.
  static bool top_suffices(const Backend& backend, int32_t needed) {
    return needed > 0 && needed <= backend.max_top_logits();
  }

  bool whole() const { return whole_; }
  std::span<const float> values() const { return values_; }  // [vocab], where whole()
  const TopLogits& top() const { return top_; }              // not regular where none are known
  // Whether the `needed` largest are in top().
  bool has_top(int32_t needed) const {
    return needed > 0 && top_.regular && static_cast<int64_t>(top_.ids.size()) >= needed;
  }

  // Where a call may write all logits: host, [vocab]. Allocates the first time alone.
  float* room(int64_t vocab);
  // Takes what a call wrote into room() for the logits.
  void set_from_room();
  void set(std::span<const float> logits);  // a copy
  // The largest of a row. device_row: where the whole row stays until forget_device_row() is
  // called, or null where others may write over it unseen.
  void set_top(TopLogits top, const float* device_row);
  // A call has begun to write over the row on the device.
  void forget_device_row() { device_row_ = nullptr; }
  void drop();  // nothing is known any more

  // Fetches the row from the device, where it is there alone.
  void fetch(Backend& backend, int64_t vocab);
  // A copy that depends on no device memory.
  NextLogits copy_to_host(Backend& backend, int64_t vocab) const;

 private:
  std::vector<float> values_;  // [vocab]; of no meaning unless whole_
  std::vector<float> room_;
  TopLogits top_;
  const float* device_row_ = nullptr;  // [vocab], device
  bool whole_ = false;
};

}  // namespace mustafar
