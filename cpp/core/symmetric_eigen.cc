// Householder reduction to tridiagonal form, then implicit QR steps with Wilkinson's shift
// (Golub and Van Loan, Matrix Computations, 4th edition, sections 8.3.1 to 8.3.5).
#include "core/symmetric_eigen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "mustafar/error.h"

namespace mustafar {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
// A step or two per eigenvalue is usual.
constexpr int64_t kMostStepsPerValue = 50;

double largest_magnitude(const std::vector<double>& values) {
  double largest = 0;
  for (double x : values) {
    if (!std::isfinite(x)) throw Error("eigenvalues of a matrix that is not finite");
    largest = std::max(largest, std::fabs(x));
  }
  return largest;
}

struct Tridiagonal {
  std::vector<double> diagonal;      // [n]
  std::vector<double> off_diagonal;  // [n], the last is 0
  std::vector<double> rows;          // [n][n] R with A = R^T T R
};

// a: [n][n] symmetric, overwritten.
Tridiagonal tridiagonalise(int32_t n, std::vector<double>& a) {
  Tridiagonal t;
  t.diagonal.resize(n);
  t.off_diagonal.resize(n);
  t.rows.assign(int64_t{n} * n, 0.0);
  for (int32_t i = 0; i < n; i++) t.rows[int64_t{i} * n + i] = 1;
  const auto row = [n](std::vector<double>& m, int32_t i) { return m.data() + int64_t{i} * n; };

  std::vector<double> v(n), w(n);
  for (int32_t k = 0; k + 2 < n; k++) {
    // The reflection that turns row k, right of the diagonal, into a multiple of its first entry.
    const double* x = row(a, k);
    double tail = 0;
    for (int32_t i = k + 2; i < n; i++) tail += x[i] * x[i];
    if (tail == 0) continue;
    const double length = std::sqrt(x[k + 1] * x[k + 1] + tail);
    const double first = -std::copysign(length, x[k + 1]);
    std::copy(x + k + 1, x + n, v.begin() + k + 1);
    v[k + 1] -= first;
    const double beta = 2 / (v[k + 1] * v[k + 1] + tail);

    // A -= v w^T + w v^T on the trailing block, w = p - (beta/2) (p^T v) v, p = beta A v.
    double dot = 0;
    for (int32_t i = k + 1; i < n; i++) {
      const double* from = row(a, i);
      double sum = 0;
      for (int32_t j = k + 1; j < n; j++) sum += from[j] * v[j];
      w[i] = beta * sum;
      dot += w[i] * v[i];
    }
    for (int32_t i = k + 1; i < n; i++) w[i] -= beta / 2 * dot * v[i];
    for (int32_t i = k + 1; i < n; i++) {
      double* to = row(a, i);
      for (int32_t j = k + 1; j < n; j++) to[j] -= v[i] * w[j] + w[i] * v[j];
    }
    row(a, k)[k + 1] = first;

    // R -= beta v (v^T R).
    std::fill(w.begin(), w.end(), 0.0);
    for (int32_t i = k + 1; i < n; i++) {
      const double* from = row(t.rows, i);
      for (int32_t j = 0; j < n; j++) w[j] += v[i] * from[j];
    }
    for (int32_t i = k + 1; i < n; i++) {
      double* to = row(t.rows, i);
      const double factor = beta * v[i];
      for (int32_t j = 0; j < n; j++) to[j] -= factor * w[j];
    }
  }
  for (int32_t i = 0; i < n; i++) {
    t.diagonal[i] = row(a, i)[i];
    t.off_diagonal[i] = i + 1 < n ? row(a, i)[i + 1] : 0;
  }
  return t;
}

// As std::hypot, whose last bit and whose symbol's version are not the same in every C library.
double hypotenuse(double x, double y) {
  const double most = std::max(std::abs(x), std::abs(y));
  if (most == 0) return 0;
  x /= most;
  y /= most;
  return most * std::sqrt(x * x + y * y);
}

// One implicit QR step on the rows lo..hi, whose off-diagonals are all significant.
void qr_step(int32_t n, int32_t lo, int32_t hi, Tridiagonal& t) {
  std::vector<double>& d = t.diagonal;
  std::vector<double>& e = t.off_diagonal;
  // The eigenvalue of the last 2 x 2 block that is closer to its last entry.
  const double half = (d[hi - 1] - d[hi]) / 2;
  const double shift =
      d[hi] - e[hi - 1] * (e[hi - 1] / (half + std::copysign(hypotenuse(half, e[hi - 1]), half)));
  double x = d[lo] - shift, z = e[lo];
  for (int32_t k = lo; k < hi; k++) {
    const double length = hypotenuse(x, z);
    const double c = length == 0 ? 1 : x / length, s = length == 0 ? 0 : z / length;
    if (k > lo) e[k - 1] = length;
    const double a = d[k], b = e[k], g = d[k + 1];
    d[k] = c * c * a + 2 * c * s * b + s * s * g;
    d[k + 1] = s * s * a - 2 * c * s * b + c * c * g;
    e[k] = c * s * (g - a) + (c - s) * (c + s) * b;
    if (k + 1 < hi) {
      x = e[k];
      z = s * e[k + 1];
      e[k + 1] *= c;
    }
    double* upper = t.rows.data() + int64_t{k} * n;
    double* lower = upper + n;
    for (int32_t j = 0; j < n; j++) {
      const double u = upper[j], l = lower[j];
      upper[j] = c * u + s * l;
      lower[j] = c * l - s * u;
    }
  }
}

}  // namespace

SymmetricEigen symmetric_eigen(int32_t n, const double* matrix) {
  std::vector<double> a(matrix, matrix + int64_t{n} * n);
  // Scaled by a power of two, which is exact, so that no product overflows or vanishes.
  const double largest = largest_magnitude(a);
  const int exponent = largest > 0 ? std::ilogb(largest) : 0;
  for (double& x : a) x = std::scalbn(x, -exponent);
  Tridiagonal t = tridiagonalise(n, a);

  std::vector<double>& d = t.diagonal;
  std::vector<double>& e = t.off_diagonal;
  int64_t steps = kMostStepsPerValue * n;
  int32_t hi = n - 1;
  while (hi > 0) {
    const auto negligible = [&](int32_t i) {
      return std::fabs(e[i]) <= kEpsilon * (std::fabs(d[i]) + std::fabs(d[i + 1])) ||
             std::fabs(e[i]) <= kEpsilon * kEpsilon;
    };
    if (negligible(hi - 1)) {
      e[--hi] = 0;
      continue;
    }
    int32_t lo = hi - 1;
    while (lo > 0 && !negligible(lo - 1)) lo--;
    if (lo > 0) e[lo - 1] = 0;
    if (steps-- == 0) throw Error("eigenvalues of a matrix did not converge");
    qr_step(n, lo, hi, t);
  }

  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return d[i] > d[j]; });
  SymmetricEigen out;
  out.values.reserve(n);
  out.vectors.reserve(int64_t{n} * n);
  for (int32_t i : order) {
    out.values.push_back(std::scalbn(d[i], exponent));
    const double* from = t.rows.data() + int64_t{i} * n;
    out.vectors.insert(out.vectors.end(), from, from + n);
  }
  return out;
}

}  // namespace mustafar
