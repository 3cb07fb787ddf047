// Devices as users name them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace mustafar {

struct DeviceName {
  enum class Kind { kAuto, kCpu, kCuda };
  static constexpr const char* kForms = "auto, cpu, cuda or cuda:N (the GPU of number N, from 0)";

  Kind kind = Kind::kAuto;
  int32_t number = 0;  // of a GPU, counted from 0 as CUDA_VISIBLE_DEVICES leaves them

  // Of one of kForms; "cuda" is "cuda:0". Nothing where it is none of them.
  static std::optional<DeviceName> find(std::string_view text);
  // The same; throws std::invalid_argument instead.
  static DeviceName parse(const std::string& text);
  // What find takes; of the first GPU "cuda".
  std::string text() const;
};

}  // namespace mustafar
