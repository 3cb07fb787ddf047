// Eigenvalues and eigenvectors of small symmetric matrices, in double.
#pragma once

#include <cstdint>
#include <vector>

namespace mustafar {

struct SymmetricEigen {
  std::vector<double> values;   // [n], falling
  std::vector<double> vectors;  // [n][n], row i belongs to values[i]; orthonormal, signs arbitrary
};

// matrix: [n][n], symmetric; n >= 1. Errors are of the order of 1e-16 of the largest eigenvalue, so
// that eigenvalues far below it are known that well and no better. Throws Error where the matrix
// holds a value that is not finite.
SymmetricEigen symmetric_eigen(int32_t n, const double* matrix);

}  // namespace mustafar
