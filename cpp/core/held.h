// What a public handle points to.
#pragma once

#include <string>

#include "mustafar/error.h"

namespace mustafar {

// Throws StateError for a handle that was moved from. what: "session", for the message.
template <typename Pointer>
auto& held(const Pointer& pointer, const char* what) {
  if (pointer == nullptr) {
    throw StateError(std::string("the ") + what + " was moved from: this one is empty");
  }
  return *pointer;
}

}  // namespace mustafar
