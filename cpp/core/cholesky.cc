// Blocks of columns from the right: the block on the diagonal is factored by itself, the rows above
// it are solved for, and their outer product leaves what is further left.
#include "core/cholesky.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace mustafar {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kTaskRows = 16;

// Columns [first, end) of rows [first, end).
bool factor_diagonal(int64_t n, int64_t first, int64_t end, double* a) {
  for (int64_t k = end - 1; k >= first; k--) {
    const double pivot = a[k * n + k];
    if (!(pivot > 0) || !std::isfinite(pivot)) return false;
    const double root = std::sqrt(pivot);
    a[k * n + k] = root;
    for (int64_t i = first; i < k; i++) a[i * n + k] /= root;
    for (int64_t i = first; i < k; i++) {
      const double x = a[i * n + k];
      for (int64_t j = i; j < k; j++) a[i * n + j] -= x * a[j * n + k];
    }
  }
  return true;
}

// Row i, above the block, in the block's columns: what times the block's root gives the row.
void solve_row(int64_t n, int64_t first, int64_t end, const double* a, double* row) {
  for (int64_t k = end - 1; k >= first; k--) {
    row[k] /= a[k * n + k];
    const double x = row[k];
    for (int64_t j = first; j < k; j++) row[j] -= x * a[j * n + k];
  }
}

}  // namespace

bool upper_root(int64_t n, std::vector<double>& a, ThreadPool& pool) {
  std::vector<double> panel(kBlock * n);  // the solved columns, transposed: [column][row]
  for (int64_t end = n; end > 0;) {
    const int64_t first = std::max<int64_t>(0, end - kBlock), width = end - first;
    if (!factor_diagonal(n, first, end, a.data())) return false;
    const int64_t tasks = (first + kTaskRows - 1) / kTaskRows;
    pool.parallel_for(tasks, [&](int64_t task, int) {
      for (int64_t i = task * kTaskRows; i < std::min(first, (task + 1) * kTaskRows); i++) {
        double* row = a.data() + i * n;
        solve_row(n, first, end, a.data(), row);
        for (int64_t k = 0; k < width; k++) panel[k * n + i] = row[first + k];
      }
    });
    pool.parallel_for(tasks, [&](int64_t task, int) {
      for (int64_t i = task * kTaskRows; i < std::min(first, (task + 1) * kTaskRows); i++) {
        double* row = a.data() + i * n;
        int64_t k = 0;
        for (; k + 4 <= width; k += 4) {
          const double* p = panel.data() + k * n;
          const double *p1 = p + n, *p2 = p1 + n, *p3 = p2 + n;
          const double x0 = p[i], x1 = p1[i], x2 = p2[i], x3 = p3[i];
          for (int64_t j = i; j < first; j++) {
            row[j] -= (x0 * p[j] + x1 * p1[j]) + (x2 * p2[j] + x3 * p3[j]);
          }
        }
        for (; k < width; k++) {
          const double* p = panel.data() + k * n;
          const double x = p[i];
          for (int64_t j = i; j < first; j++) row[j] -= x * p[j];
        }
      }
    });
    end = first;
  }
  return true;
}

}  // namespace mustafar
