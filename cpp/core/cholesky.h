// The triangular root of a symmetric matrix, in double.
#pragma once

#include <cstdint>
#include <vector>

#include "core/thread_pool.h"

namespace mustafar {

// R, upper triangular, with A = R R^T: the last rows first, so that column k of R says how far what
// comes before k can make up for k. a: [n][n], symmetric and positive definite, of which the upper
// triangle is read, and overwritten with R; what is below is left undefined. False where the matrix
// is not positive definite, or not finite.
bool upper_root(int64_t n, std::vector<double>& a, ThreadPool& pool);

}  // namespace mustafar
