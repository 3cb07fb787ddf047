#include "backend/device_name.h"

#include <charconv>
#include <stdexcept>

namespace mustafar {

std::optional<DeviceName> DeviceName::find(std::string_view text) {
  if (text == "auto") return DeviceName{Kind::kAuto};
  if (text == "cpu") return DeviceName{Kind::kCpu};
  if (text == "cuda") return DeviceName{Kind::kCuda};
  constexpr std::string_view kPrefix = "cuda:";
  if (!text.starts_with(kPrefix)) return std::nullopt;
  const std::string_view digits = text.substr(kPrefix.size());
  if (digits.empty() || digits[0] == '-') return std::nullopt;  // from_chars takes a minus
  DeviceName name{Kind::kCuda};
  const char* const end = digits.data() + digits.size();
  const auto [at, error] = std::from_chars(digits.data(), end, name.number);
  if (at != end || error != std::errc()) return std::nullopt;
  return name;
}

DeviceName DeviceName::parse(const std::string& text) {
  if (const auto name = find(text)) return *name;
  throw std::invalid_argument(std::string("device: expected ") + kForms + ", got \"" + text + "\"");
}

std::string DeviceName::text() const {
  if (kind == Kind::kAuto) return "auto";
  if (kind == Kind::kCpu) return "cpu";
  return number == 0 ? "cuda" : "cuda:" + std::to_string(number);
}

}  // namespace mustafar
