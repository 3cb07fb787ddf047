#include "runtime/position_energies.h"

#include <algorithm>
#include <cmath>

namespace mustafar {
namespace {

constexpr int64_t kFirstOffset = 1024;

// Turns a vector [d], element i of which stands at x[i * stride], as RoPE does: pairs (i, half +
// i).
void turn(const std::vector<double>& cos, const std::vector<double>& sin, int64_t stride,
          double* x) {
  const int64_t half = static_cast<int64_t>(cos.size());
  for (int64_t i = 0; i < half; i++) {
    double &a = x[i * stride], &b = x[(half + i) * stride];
    const double turned = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = turned;
  }
}

}  // namespace

std::vector<int64_t> text_offsets(int64_t context) {
  std::vector<int64_t> offsets = {0};
  for (int64_t octave = kFirstOffset; octave < context; octave *= 2) {
    offsets.push_back(octave);
    if (octave + octave / 2 < context) offsets.push_back(octave + octave / 2);
  }
  return offsets;
}

std::vector<double> most_energies(const ModelConfig& config, const std::vector<int64_t>& offsets,
                                  const std::vector<double>& moment,
                                  const std::vector<double>& forward) {
  const int64_t d = config.head_dim;
  const std::vector<float> frequencies = config.rope_inverse_frequencies();
  std::vector<double> cos(frequencies.size()), sin(frequencies.size());
  std::vector<double> most(d, 0.0), energy(d), met(d), turned;
  for (const int64_t offset : offsets) {
    for (size_t i = 0; i < frequencies.size(); i++) {
      const double angle = static_cast<double>(offset) * frequencies[i];
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
    turned = moment;
    for (int64_t i = 0; i < d; i++) turn(cos, sin, 1, turned.data() + i * d);
    for (int64_t i = 0; i < d; i++) turn(cos, sin, d, turned.data() + i);
    // The diagonal of F^T E F, a row of E at a time.
    std::fill(energy.begin(), energy.end(), 0.0);
    for (int64_t i = 0; i < d; i++) {
      std::fill(met.begin(), met.end(), 0.0);
      for (int64_t k = 0; k < d; k++) {
        const double x = turned[i * d + k];
        const double* row = forward.data() + k * d;
        for (int64_t j = 0; j < d; j++) met[j] += x * row[j];
      }
      for (int64_t j = 0; j < d; j++) energy[j] += forward[i * d + j] * met[j];
    }
    for (int64_t j = 0; j < d; j++) most[j] = std::max(most[j], energy[j]);
  }
  return most;
}

}  // namespace mustafar
