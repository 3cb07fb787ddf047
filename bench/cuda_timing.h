// What the GPU benchmarks share: time of a recorded step, the copy bandwidth as a ceiling, and rows
// that could not be measured.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <vector>

#include "cuda/buffer.h"
#include "cuda/device.h"
#include "mustafar/error.h"

namespace mustafar::cuda {

// Seconds of one run of the graph: the median of seven batches of runs that last `budget` seconds
// together.
inline double seconds_of(Stream stream, Graph graph, double budget) {
  using Clock = std::chrono::steady_clock;
  const auto timed = [&](int n) {
    const auto start = Clock::now();
    for (int i = 0; i < n; i++) run_graph(graph, stream);
    synchronize(stream);
    return std::chrono::duration<double>(Clock::now() - start).count() / n;
  };
  timed(2);
  const double once = timed(3);
  const int n = std::clamp(static_cast<int>(budget / 7 / once), 1, 1000);
  std::vector<double> samples;
  for (int i = 0; i < 7; i++) samples.push_back(timed(n));
  std::nth_element(samples.begin(), samples.begin() + 3, samples.end());
  return samples[3];
}

// Bytes per second of a device-to-device copy, counting both directions.
inline double copy_bandwidth(Stream stream, double budget) {
  const int64_t bytes = int64_t{4} << 30;
  DeviceBuffer from, to;
  from.ensure<uint8_t>(bytes);
  to.ensure<uint8_t>(bytes);
  const Graph graph =
      record_graph(stream, [&] { copy_on_device(to.data(), from.data(), bytes, stream); });
  const double seconds = seconds_of(stream, graph, budget);
  destroy_graph(graph);
  return 2.0 * static_cast<double>(bytes) / seconds;
}

// What body says, or false where it throws: then row, what was to be measured, is printed with the
// error, and the next can go on.
template <typename Body>
bool measured(nlohmann::json row, Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    row["error"] = error.what();
    std::printf("%s\n", row.dump().c_str());
    std::fflush(stdout);
    return false;
  }
}

}  // namespace mustafar::cuda
