#include "backend/cpu/compress/expand.h"

#include <algorithm>
#include <vector>

#include "format/coded.h"
#include "format/pack.h"

namespace mustafar {
namespace {

// What one kind's rows of a cache are in, from the model's own coordinates and back: a matrix of
// each head, whose products are in stored order, or that order alone.
struct Basis {
  const float* forward = nullptr;   // [n_layers][n_kv_heads][D][D], or null
  const float* backward = nullptr;  // likewise
  int32_t n_groups = 1;

  bool operator==(const Basis&) const = default;
  bool is_own() const { return forward == nullptr && n_groups == 1; }  // the model's
};

Basis basis_of(const KVTransform& transform, int32_t kind) {
  return kind == kKeys ? Basis{transform.k_forward, transform.k_backward, transform.k_groups}
                       : Basis{transform.v_forward, transform.v_backward, transform.v_groups};
}

// Scratch of one worker.
struct Rows {
  std::vector<float> rows;   // [64][head_dim]
  std::vector<float> other;  // [head_dim]
};

// row [head_dim], in place. matrix: the head's, [D][D].
void change_basis(const Kernels& kernels, const Basis& from, const Basis& to, int64_t matrix,
                  int32_t head_dim, float* row, float* other) {
  if (from.backward != nullptr) {
    kernels.multiply_row(row, from.backward + matrix, head_dim, other);
    std::copy_n(other, head_dim, row);
  } else if (from.n_groups > 1) {
    for (int32_t d = 0; d < head_dim; d++) other[d] = row[stored_index(d, from.n_groups, head_dim)];
    std::copy_n(other, head_dim, row);
  }
  if (to.forward != nullptr) {
    kernels.multiply_row(row, to.forward + matrix, head_dim, other);
    std::copy_n(other, head_dim, row);
  } else if (to.n_groups > 1) {
    for (int32_t d = 0; d < head_dim; d++) other[stored_index(d, to.n_groups, head_dim)] = row[d];
    std::copy_n(other, head_dim, row);
  }
}

}  // namespace

void expand_rows(ThreadPool& pool, const Kernels& kernels, DType tail_dtype,
                 const SequenceStep& step, int32_t block, const KVTransform& to, uint8_t* out,
                 int32_t out_capacity) {
  const StoreLayout& layout = *step.layout;
  const int32_t heads = layout.n_kv_heads, head_dim = layout.k.head_dim;
  const int64_t row_bytes = dtype_bytes(tail_dtype, head_dim);
  const bool dense = block == Backend::kDenseRows;
  const int32_t n_rows = dense ? step.dense_tokens : kBlockTokens;
  std::vector<Rows> scratch(pool.size());
  pool.parallel_for(int64_t{2} * layout.n_layers * heads, [&](int64_t i, int worker) {
    const auto layer = static_cast<int32_t>(i / (2 * heads));
    const auto head = static_cast<int32_t>(i / 2 % heads);
    const auto kind = static_cast<int32_t>(i % 2);
    const bool is_key = kind == kKeys;
    const Basis from_basis = basis_of(step.transform, kind), to_basis = basis_of(to, kind);
    const bool same = from_basis == to_basis || (from_basis.is_own() && to_basis.is_own());
    const int64_t matrix = head_index(layer, heads, head) * head_dim * head_dim;
    uint8_t* const rows_out = out + dense_offset(out_capacity, layer, kind, heads, head, row_bytes);
    Rows& work = scratch[worker];
    work.other.resize(head_dim);
    if (dense) {
      work.rows.resize(head_dim);
    } else {
      work.rows.resize(size_t{kBlockTokens} * head_dim);
      const SlotLayout& slot_layout = slot_of(layout, layer, is_key);
      const uint8_t* slot = step.pages[block] + (is_key ? k_slot_offset(layout, layer, head)
                                                        : v_slot_offset(layout, layer, head));
      if (slot_layout.dtype == DType::kCoded) {
        unpack_coded_slot(slot_layout, code_table(step.codes, layout, layer, head, is_key), slot,
                          work.rows.data());
      } else {
        unpack_slot(slot_layout, slot, work.rows.data());
      }
    }
    const uint8_t* const rows_in =
        step.dense + dense_offset(step, layer, kind, heads, head, row_bytes);
    for (int32_t t = 0; t < n_rows; t++) {
      float* row = work.rows.data();
      if (dense) {
        kernels.to_f32(rows_in + t * row_bytes, tail_dtype, head_dim, row);
      } else {
        row += int64_t{t} * head_dim;
      }
      if (!same)
        change_basis(kernels, from_basis, to_basis, matrix, head_dim, row, work.other.data());
      kernels.from_f32(row, head_dim, tail_dtype, rows_out + t * row_bytes);
    }
  });
}

}  // namespace mustafar
