#include "format/coded.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/dtype.h"

namespace mustafar {
namespace {

// The share of a Gaussian dim's energy that is left as square error, by the dim's width, at the
// step that is best for that width.
constexpr double kError[kMaxWidth + 1] = {1,        0.3634,   0.1175,   0.03454,
                                          0.009497, 0.002499, 0.000642, 0.000163};

// Sums of a row, in the order that every packer keeps to.
struct Lanes {
  float lane[kSumLanes] = {};

  float total() {
    for (int32_t half = kSumLanes / 2; half > 0; half /= 2) {
      for (int32_t i = 0; i < half; i++) lane[i] += lane[i + half];
    }
    return lane[0];
  }
};

float inverse_of(float x) { return x >= kLeastScale ? 1.0f / x : 0.0f; }

// A code as a float; its integer part is what counts.
float code_of(const CodeRow& row, float x, int32_t d, float inverse) {
  const float code = x * row.inverse_step[d] * inverse + row.half[d];
  return std::min(std::max(code, 0.0f), row.top[d]);
}

// Sum of fourth powers of errors, in units of the row's root mean square.
float error_of(const CodeRow& row, const float* x, int32_t n, float scale, float inverse_rms) {
  const float inverse = inverse_of(scale), ratio = scale * inverse_rms;
  Lanes sums;
  for (int32_t d = 0; d < n; d++) {
    const float code = static_cast<float>(static_cast<int32_t>(code_of(row, x[d], d, inverse)));
    const float level = code - (row.half[d] - 0.5f);
    const float error = x[d] * inverse_rms - level * row.step[d] * ratio;
    sums.lane[d % kSumLanes] += (error * error) * (error * error);
  }
  return sums.total();
}

// The row's scale as bf16 bits; Inf or NaN where x has no finite root mean square.
uint16_t choose_scale(const CodeRow& row, const float* x, int32_t n) {
  Lanes sums;
  for (int32_t d = 0; d < n; d++) {
    const float u = x[d] * row.inverse_sigma[d];
    sums.lane[d % kSumLanes] += u * u;
  }
  const float rms = std::sqrt(sums.total() / static_cast<float>(n));
  uint16_t best = f32_to_bf16(rms);
  if (!std::isfinite(bf16_to_f32(best))) return best;
  const float inverse_rms = inverse_of(rms);
  float least = INFINITY;
  for (const float factor : kScaleFactors) {
    const uint16_t bits = f32_to_bf16(rms * factor);
    const float error = error_of(row, x, n, bf16_to_f32(bits), inverse_rms);
    if (error < least) {
      least = error;
      best = bits;
    }
  }
  return best;
}

// Deals bits to dims one at a time (see deal_widths).
class WidthDealer {
 public:
  // widths: [n], set to zero.
  WidthDealer(const float* sigmas, int32_t n, uint8_t* widths)
      : energies_(n), gains_(n), widths_(widths) {
    std::memset(widths, 0, n);
    for (int32_t d = 0; d < n; d++) {
      energies_[d] = static_cast<double>(sigmas[d]) * sigmas[d];
      gains_[d] = gain(d);
    }
  }

  // Deals n_bits more, or fewer where every dim has the most it can.
  void deal(int32_t n_bits) {
    for (int32_t bit = 0; bit < n_bits; bit++) {
      const int64_t best = std::max_element(gains_.begin(), gains_.end()) - gains_.begin();
      if (gains_[best] < 0) return;
      widths_[best]++;
      gains_[best] = gain(best);
    }
  }

  double error() const {
    double sum = 0;
    for (size_t d = 0; d < energies_.size(); d++) sum += energies_[d] * kError[widths_[d]];
    return sum;
  }

 private:
  // How much one bit more lowers the square error of dim d; -1 where it has the most it can.
  double gain(int64_t d) const {
    if (widths_[d] == kMaxWidth) return -1.0;
    return energies_[d] * (kError[widths_[d]] - kError[widths_[d] + 1]);
  }

  std::vector<double> energies_, gains_;  // [n]
  uint8_t* widths_;
};

// Appends codes to a row's bits.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}
  void put(uint32_t code, int32_t width) {
    pending_ |= code << n_;
    for (n_ += width; n_ >= 8; n_ -= 8, pending_ >>= 8) *out_++ = static_cast<uint8_t>(pending_);
  }
  void end() {
    if (n_ > 0) *out_ = static_cast<uint8_t>(pending_);
  }

 private:
  uint8_t* out_;
  uint32_t pending_ = 0;
  int32_t n_ = 0;  // bits of pending_, fewer than 8
};

class BitReader {
 public:
  explicit BitReader(const uint8_t* in) : in_(in) {}
  uint32_t get(int32_t width) {
    for (; n_ < width; n_ += 8) pending_ |= uint32_t{*in_++} << n_;
    const uint32_t code = pending_ & ((1u << width) - 1);
    pending_ >>= width;
    n_ -= width;
    return code;
  }

 private:
  const uint8_t* in_;
  uint32_t pending_ = 0;
  int32_t n_ = 0;
};

}  // namespace

void deal_widths(const float* sigmas, int32_t head_dim, int32_t row_bytes, uint8_t* widths) {
  WidthDealer dealer(sigmas, head_dim, widths);
  dealer.deal(8 * row_bytes);
}

void coded_errors(const float* sigmas, int32_t head_dim, int32_t n_words, double* errors) {
  std::vector<uint8_t> widths(head_dim);
  WidthDealer dealer(sigmas, head_dim, widths.data());
  for (int32_t w = 0; w < n_words; w++) {
    dealer.deal(32);
    errors[w] = dealer.error();
  }
}

CodeRow make_code_row(const CodeTable& table, int32_t head_dim, float* memory) {
  float* parts[5];
  for (int i = 0; i < 5; i++) parts[i] = memory + int64_t{i} * head_dim;
  for (int32_t d = 0; d < head_dim; d++) {
    const float step = coded_step(table.widths[d]) * table.sigmas[d];
    parts[0][d] = inverse_of(table.sigmas[d]);
    parts[1][d] = step;
    parts[2][d] = inverse_of(step);
    parts[3][d] = static_cast<float>(1 << table.widths[d]) * 0.5f;
    parts[4][d] = static_cast<float>((1 << table.widths[d]) - 1);
  }
  return {parts[0], parts[1], parts[2], parts[3], parts[4]};
}

int32_t pack_coded_block(const SlotLayout& layout, const CodeTable& table, const float* rows,
                         uint8_t* slot) {
  const int32_t n = layout.head_dim;
  std::vector<float> memory(size_t{5} * n);
  const CodeRow row = make_code_row(table, n, memory.data());
  std::memset(slot, 0, layout.slot_bytes);
  for (int32_t t = 0; t < kBlockTokens; t++) {
    const float* x = rows + t * n;
    const uint16_t scale_bits = choose_scale(row, x, n);
    const float scale = bf16_to_f32(scale_bits);
    if (!std::isfinite(scale)) return t;
    std::memcpy(slot + layout.scales_offset + t * 2, &scale_bits, 2);
    const float inverse = inverse_of(scale);
    BitWriter bits(slot + layout.values_offset + t * layout.row_bytes);
    for (int32_t d = 0; d < n; d++) {
      bits.put(static_cast<uint32_t>(code_of(row, x[d], d, inverse)), table.widths[d]);
    }
    bits.end();
  }
  return -1;
}

void unpack_coded_row(const SlotLayout& layout, const CodeTable& table, const uint8_t* slot,
                      int32_t row, float* out) {
  uint16_t scale_bits;
  std::memcpy(&scale_bits, slot + layout.scales_offset + row * 2, 2);
  const float scale = bf16_to_f32(scale_bits);
  BitReader bits(slot + layout.values_offset + row * layout.row_bytes);
  for (int32_t d = 0; d < layout.head_dim; d++) {
    const int32_t width = table.widths[d];
    const float middle = static_cast<float>(1 << width) * 0.5f - 0.5f;
    const float level = static_cast<float>(bits.get(width)) - middle;
    out[d] = width == 0 ? 0.0f : level * (coded_step(width) * table.sigmas[d]) * scale;
  }
}

void unpack_coded_slot(const SlotLayout& layout, const CodeTable& table, const uint8_t* slot,
                       float* out) {
  for (int32_t t = 0; t < kBlockTokens; t++) {
    unpack_coded_row(layout, table, slot, t, out + t * layout.head_dim);
  }
}

}  // namespace mustafar
