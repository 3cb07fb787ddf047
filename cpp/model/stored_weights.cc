#include "model/stored_weights.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace mustafar {
namespace {

constexpr int64_t kTaskRows = 8 * kTileRows;  // what a line of the files' caches holds, of AWQ's

template <typename Body>
void for_each_task(ThreadPool* pool, int64_t n, const Body& body) {
  if (pool != nullptr) return pool->parallel_for(n, body);
  for (int64_t i = 0; i < n; i++) body(i, 0);
}

// Bytes from one row of unpacked codes to the next: an odd number of lines, so that rows of a
// column lie in different sets of the cache.
int64_t row_stride(int64_t cols) { return ((cols + kLineBytes - 1) / kLineBytes | 1) * kLineBytes; }

// The codes of 16 rows, [16][stride] with zeros after the last input, as lines of a tile.
void pack_tile(const QuantisedShape& shape, const uint8_t* rows, int64_t stride, uint8_t* tile) {
  const int64_t inputs = shape.line_inputs();
  for (int64_t c = 0; c < shape.inner(); c += inputs, tile += kLineBytes) {
    for (int64_t lane = 0; lane < kTileRows; lane++) {
      const uint8_t* from = rows + lane * stride + c;
      uint32_t low, high = 0;
      std::memcpy(&low, from, sizeof low);
      if (shape.dtype == DType::kInt4) std::memcpy(&high, from + 4, sizeof high);
      const uint32_t word = low | high << 4;
      std::memcpy(tile + lane * 4, &word, sizeof word);
    }
  }
}

std::array<float, 256> float8_values() {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; code++) values[code] = e4m3_to_f32(static_cast<uint8_t>(code));
  return values;
}

float zero_of(const StoredMatrix& stored, int64_t row, int64_t group) {
  return static_cast<float>(stored.has_zeros ? stored.zero(row, group) : stored.middle());
}

// out [cols] = a row of weights from its codes.
void expand_row(const StoredMatrix& stored, int64_t row, const uint8_t* codes, float* out) {
  static const std::array<float, 256> kFloat8 = float8_values();
  const int64_t cols = stored.cols, groups = stored.n_groups();
  if (!stored.input_groups.empty()) {
    std::vector<float> scales, zeros;
    for (int64_t g = 0; g < groups; g++) {
      scales.push_back(stored.scale(row, g));
      zeros.push_back(zero_of(stored, row, g));
    }
    for (int64_t c = 0; c < cols; c++) {
      const int32_t g = stored.input_groups[c];
      out[c] = scales[g] * (static_cast<float>(codes[c]) - zeros[g]);
    }
    return;
  }
  const int64_t size = groups > 1 ? stored.group : cols;
  for (int64_t g = 0, c = 0; g < groups; g++) {
    const float scale = stored.scale(row, g), zero = zero_of(stored, row, g);
    const int64_t end = std::min(cols, c + size);
    if (stored.is_float) {
      for (; c < end; c++) out[c] = scale * kFloat8[codes[c]];
    } else {
      for (; c < end; c++) out[c] = scale * (static_cast<float>(codes[c]) - zero);
    }
  }
}

}  // namespace

bool keeps_codes(const StoredMatrix& stored) {
  return !stored.is_float && stored.input_groups.empty() &&
         (stored.n_groups() == 1 || stored.group % kInnerStep == 0);
}

QuantisedShape code_shape(const StoredMatrix& stored, int64_t rows) {
  QuantisedShape shape;
  shape.dtype = stored.bits == 4 ? DType::kInt4 : DType::kInt8;
  shape.scale_dtype = stored.scales.dtype;
  shape.offset = stored.has_zeros ? Offset::kZeros : Offset::kNone;
  shape.rows = rows;
  shape.cols = stored.cols;
  shape.group = static_cast<int32_t>(stored.n_groups() == 1 ? shape.inner() : stored.group);
  return shape;
}

void unpack_codes(const StoredMatrix& stored, int64_t row, const QuantisedShape& shape,
                  ThreadPool* pool, void* memory) {
  uint8_t* const codes = static_cast<uint8_t*>(memory);
  uint8_t* const scales = codes + shape.scales_at();
  uint8_t* const zeros = codes + shape.offsets_at();
  const int64_t stride = row_stride(shape.inner()), groups = shape.n_groups();
  for_each_task(pool, (shape.rows + kTaskRows - 1) / kTaskRows, [&](int64_t task, int) {
    const int64_t first = task * kTaskRows, n = std::min(kTaskRows, shape.rows - first);
    std::vector<uint8_t> rows(static_cast<size_t>(kTaskRows * stride));
    stored.read_codes(row + first, n, stride, rows.data());
    for (int64_t r = 0; r < n; r += kTileRows) {
      pack_tile(shape, rows.data() + r * stride, stride,
                codes + (first + r) / kTileRows * shape.tile_code_bytes());
    }
    // Rows that fill the last tile have scales of 0.
    for (int64_t r = first; r < first + (n + kTileRows - 1) / kTileRows * kTileRows; r++) {
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = scale_at(shape, r, g * shape.group);
        const bool is_there = r < shape.rows;
        store_float(scales, shape.scale_dtype, at, is_there ? stored.scale(row + r, g) : 0.0f);
        if (shape.offset == Offset::kZeros) {
          zeros[at] = static_cast<uint8_t>(is_there ? stored.zero(row + r, g) : 0);
        }
      }
    }
  });
}

void expand(const StoredMatrix& stored, int64_t row, int64_t n, ThreadPool* pool, void* out) {
  const int64_t cols = stored.cols, stride = row_stride(cols);
  const int64_t row_bytes = dtype_bytes(stored.expanded, cols);
  for_each_task(pool, (n + kTaskRows - 1) / kTaskRows, [&](int64_t task, int) {
    const int64_t first = task * kTaskRows, count = std::min(kTaskRows, n - first);
    std::vector<uint8_t> rows(static_cast<size_t>(count * stride));
    stored.read_codes(row + first, count, stride, rows.data());
    std::vector<float> values(static_cast<size_t>(cols));
    for (int64_t r = 0; r < count; r++) {
      expand_row(stored, row + first + r, rows.data() + r * stride, values.data());
      uint8_t* const to = static_cast<uint8_t*>(out) + (first + r) * row_bytes;
      for (int64_t c = 0; c < cols; c++) store_float(to, stored.expanded, c, values[c]);
    }
  });
}

std::string describe_kept(const StoredMatrix& stored) {
  const std::string text = stored.description();
  if (keeps_codes(stored)) return text;
  return text + ": expanded to " + dtype_name(stored.expanded);
}

}  // namespace mustafar
