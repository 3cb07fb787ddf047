// A thread for a part of a test.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <thread>

namespace mustafar::testing {

// Runs body on a thread of its own, to its end; what it throws is a failure of the test.
template <typename Body>
void on_a_thread(Body body) {
  std::thread([&] {
    try {
      body();
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
  }).join();
}

}  // namespace mustafar::testing
