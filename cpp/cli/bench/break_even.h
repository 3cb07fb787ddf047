// From which context depth a cache setting makes a decode step faster than the dense cache does.
#pragma once

#include <algorithm>
#include <vector>

namespace mustafar::cli {

// A decode step's time over the depth: ns = base + slope * tokens of depth, least squares.
struct DepthFit {
  double base_ns = 0;
  double ns_per_token = 0;
};
inline DepthFit fit_depth(const std::vector<double>& depths, const std::vector<double>& step_ns) {
  const double n = static_cast<double>(depths.size());
  double mean_x = 0;
  double mean_y = 0;
  for (size_t i = 0; i < depths.size(); i++) {
    mean_x += depths[i] / n;
    mean_y += step_ns[i] / n;
  }
  double xx = 0;
  double xy = 0;
  for (size_t i = 0; i < depths.size(); i++) {
    xx += (depths[i] - mean_x) * (depths[i] - mean_x);
    xy += (depths[i] - mean_x) * (step_ns[i] - mean_y);
  }
  const double slope = xx > 0 ? xy / xx : 0;
  return {mean_y - slope * mean_x, slope};
}

// The depth in tokens at which `setting` becomes as fast as `dense`; 0: it always is, at depths
// that matter; -1: never.
inline double break_even_depth(const DepthFit& dense, const DepthFit& setting) {
  const double cost = setting.base_ns - dense.base_ns;            // paid at every depth
  const double gain = dense.ns_per_token - setting.ns_per_token;  // per token of depth
  if (gain <= 0) return -1;
  return std::max(0.0, cost / gain);
}

}  // namespace mustafar::cli
