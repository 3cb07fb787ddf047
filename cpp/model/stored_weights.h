// What the matrices of a quantised folder become in memory: the codes that they are, in the order
// of the kernels, where the format holds them, else values.
#pragma once

#include <cstdint>
#include <string>

#include "core/thread_pool.h"
#include "format/quantised_matrix.h"
#include "io/quantised/stored_matrix.h"

namespace mustafar {

// Integers whose groups are of neighbouring inputs, 32 of them or a multiple, or whole rows. A
// weight is then scale * (code - zero), rounded once to f32.
bool keeps_codes(const StoredMatrix& stored);

// Of `rows` of its rows, where it keeps its codes.
QuantisedShape code_shape(const StoredMatrix& stored, int64_t rows);

// Codes, scales and zero points of rows [row, row + shape.rows) to memory of shape.bytes(). pool:
// null for the calling thread alone.
void unpack_codes(const StoredMatrix& stored, int64_t row, const QuantisedShape& shape,
                  ThreadPool* pool, void* memory);

// Rows [row, row + n) as values of type stored.expanded, to out [n][cols]: the products of scales
// and codes in f32, rounded to that type.
void expand(const StoredMatrix& stored, int64_t row, int64_t n, ThreadPool* pool, void* out);

// What becomes of it, as in "int4, groups of 128, zero points" or "fp8, one scale: expanded to
// bf16".
std::string describe_kept(const StoredMatrix& stored);

}  // namespace mustafar
