// Rounding with error feedback against GPTQ as its paper writes it, and what it is for: smaller
// errors of the products than rounding gives.
#include "model/error_feedback.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "core/cholesky.h"
#include "model/group_fit.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

using Doubles = std::vector<double>;

// Weights [rows][cols] and correlated activations [tokens][cols], with their sums x^T x.
struct Problem {
  int64_t rows, cols, tokens;
  std::vector<float> weights, activations, sums;
  Matrix matrix;

  Problem(int64_t r, int64_t c, int64_t n, uint32_t seed) : rows(r), cols(c), tokens(n) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * cols; i++) weights.push_back(0.05f * normal(random));
    const int64_t hidden = std::max<int64_t>(cols / 4, 1);  // what the inputs have in common
    std::vector<float> mix(hidden * cols), common(hidden);
    for (float& x : mix) x = normal(random);
    for (int64_t t = 0; t < tokens; t++) {
      for (float& x : common) x = normal(random);
      for (int64_t i = 0; i < cols; i++) {
        float x = 0.3f * normal(random);
        for (int64_t k = 0; k < hidden; k++) x += common[k] * mix[k * cols + i];
        activations.push_back(x * (i % 7 == 0 ? 4.0f : 1.0f));  // some inputs are larger
      }
    }
    sums.resize(cols * cols);
    for (int64_t i = 0; i < cols; i++) {
      for (int64_t j = 0; j < cols; j++) {
        double sum = 0;
        for (int64_t t = 0; t < tokens; t++) {
          sum += double{activations[t * cols + i]} * activations[t * cols + j];
        }
        sums[i * cols + j] = static_cast<float>(sum);
      }
    }
    matrix = Matrix{weights.data(), DType::kF32, rows, cols};
  }

  // Sum of squares that the product with the activations is off by.
  double error(const GroupCodes& codes) const {
    double sum = 0;
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t t = 0; t < tokens; t++) {
        double off = 0;
        for (int64_t c = 0; c < cols; c++) {
          off += (double{codes.weight(r, c)} - weights[r * cols + c]) * activations[t * cols + c];
        }
        sum += off * off;
      }
    }
    return sum;
  }
};

// Gauss-Jordan, of a positive definite matrix.
Doubles inverse(int64_t n, Doubles a) {
  Doubles b(n * n, 0.0);
  for (int64_t i = 0; i < n; i++) b[i * n + i] = 1;
  for (int64_t k = 0; k < n; k++) {
    const double pivot = a[k * n + k];
    for (int64_t j = 0; j < n; j++) a[k * n + j] /= pivot, b[k * n + j] /= pivot;
    for (int64_t i = 0; i < n; i++) {
      if (i == k) continue;
      const double x = a[i * n + k];
      for (int64_t j = 0; j < n; j++) {
        a[i * n + j] -= x * a[k * n + j];
        b[i * n + j] -= x * b[k * n + j];
      }
    }
  }
  return b;
}

// U, upper triangular, with a = U^T U.
Doubles cholesky(int64_t n, const Doubles& a) {
  Doubles u(n * n, 0.0);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = i; j < n; j++) {
      double sum = a[i * n + j];
      for (int64_t k = 0; k < i; k++) sum -= u[k * n + i] * u[k * n + j];
      u[i * n + j] = i == j ? std::sqrt(sum) : sum / u[i * n + i];
    }
  }
  return u;
}

// Algorithm 1 of the paper without its blocks, inputs by falling energy: codes [rows][cols].
std::vector<int> gptq(const Problem& p, const GroupFormat& format, double damping) {
  const int64_t n = p.cols;
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return p.sums[i * n + i] > p.sums[j * n + j]; });
  double mean = 0;
  for (int64_t i = 0; i < n; i++) mean += p.sums[i * n + i] / static_cast<double>(n);
  Doubles h(n * n);
  std::vector<float> energy(n);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < n; j++) h[i * n + j] = p.sums[order[i] * n + order[j]];
    h[i * n + i] += damping * mean;
    energy[order[i]] = static_cast<float>(h[i * n + i]);
  }
  const Doubles u = cholesky(n, inverse(n, h));
  std::vector<int> codes(p.rows * n);
  for (int64_t r = 0; r < p.rows; r++) {
    std::vector<GroupScales> scales;
    for (int64_t i = 0; i < n; i += format.group) {
      std::vector<float> x(format.group * kFitRows, 0.0f);
      for (int64_t c = 0; c < format.group; c++) x[c * kFitRows] = p.weights[r * n + i + c];
      scales.push_back(fit_group(format, x.data(), energy.data() + i, format.group));
    }
    Doubles w(n);
    for (int64_t i = 0; i < n; i++) w[i] = p.weights[r * n + order[i]];
    for (int64_t i = 0; i < n; i++) {
      const GroupScales& group = scales[order[i] / format.group];
      const double level = std::nearbyint(w[i] / group.scale[0] + group.zero[0]);
      const double code = std::clamp(level, 0.0, double(format.top()));
      codes[r * n + order[i]] = static_cast<int>(code);
      const double off = (w[i] - group.scale[0] * (code - group.zero[0])) / u[i * n + i];
      for (int64_t j = i; j < n; j++) w[j] -= off * u[i * n + j];
    }
  }
  return codes;
}

TEST(ErrorFeedback, GivesTheCodesOfThePaper) {
  ThreadPool pool(2);
  for (const bool symmetric : {false, true}) {
    for (const int32_t bits : {4, 8}) {
      const Problem p(21, 160, 300, 5);
      const GroupFormat format{bits, 32, symmetric, DType::kBF16};
      GroupCodes codes(format, p.rows, p.cols);
      const InputMoments moments(p.cols, p.sums.data(), 0.01, pool);
      ASSERT_TRUE(round_with_feedback(p.matrix, moments, pool, codes));
      const std::vector<int> expected = gptq(p, format, 0.01);
      // Arithmetic in f32 beside double: a weight on the edge between two codes may take the other
      // one, and what follows in its row differs then.
      int same = 0;
      for (size_t i = 0; i < expected.size(); i++) same += expected[i] == codes.codes[i];
      EXPECT_GE(same, static_cast<int>(expected.size()) * (bits == 4 ? 98 : 90) / 100)
          << bits << " bits, symmetric " << symmetric;
    }
  }
}

TEST(ErrorFeedback, LosesLessThanRounding) {
  ThreadPool pool(1);
  for (const uint32_t seed : {1u, 2u, 3u}) {
    for (const int32_t group : {32, 64}) {
      const Problem p(40, 192, 400, seed);
      GroupCodes nearest({4, group, false, DType::kBF16}, p.rows, p.cols), fed = nearest;
      ASSERT_TRUE(round_matrix(p.matrix, pool, nearest));
      const InputMoments moments(p.cols, p.sums.data(), 0.01, pool);
      ASSERT_TRUE(round_with_feedback(p.matrix, moments, pool, fed));
      EXPECT_LT(p.error(fed), 0.5 * p.error(nearest)) << "seed " << seed << ", group " << group;
    }
  }
}

// Where inputs have nothing in common no input can stand in for another.
TEST(ErrorFeedback, IsRoundingWhereInputsAreIndependent) {
  ThreadPool pool(1);
  Problem p(20, 64, 1, 4);
  for (int64_t i = 0; i < p.cols; i++) {
    for (int64_t j = 0; j < p.cols; j++) p.sums[i * p.cols + j] = i == j ? 1.0f : 0.0f;
  }
  GroupCodes nearest({4, 32, false, DType::kF16}, p.rows, p.cols), fed = nearest;
  ASSERT_TRUE(round_matrix(p.matrix, pool, nearest));
  const InputMoments moments(p.cols, p.sums.data(), 0.01, pool);
  ASSERT_TRUE(round_with_feedback(p.matrix, moments, pool, fed));
  EXPECT_EQ(nearest.codes, fed.codes);
  EXPECT_EQ(nearest.scales, fed.scales);
  EXPECT_EQ(nearest.zeros, fed.zeros);
}

TEST(ErrorFeedback, TakesInputsThatAreNeverThere) {
  ThreadPool pool(1);
  Problem p(20, 64, 50, 4);
  for (int64_t i = 0; i < p.cols; i++) p.sums[3 * p.cols + i] = p.sums[i * p.cols + 3] = 0;
  GroupCodes codes({4, 32, false, DType::kBF16}, p.rows, p.cols);
  ASSERT_TRUE(round_with_feedback(p.matrix, {p.cols, p.sums.data(), 0.01, pool}, pool, codes));
  const std::vector<float> none(p.cols * p.cols, 0.0f);
  ASSERT_TRUE(round_with_feedback(p.matrix, {p.cols, none.data(), 0.01, pool}, pool, codes));
  p.sums[0] = INFINITY;
  EXPECT_THROW(InputMoments(p.cols, p.sums.data(), 0.01, pool), Error);
}

TEST(ErrorFeedback, RefusesWeightsThatAreNotFinite) {
  ThreadPool pool(1);
  for (const float bad : {NAN, INFINITY}) {
    Problem p(20, 64, 50, 4);
    p.weights[5 * p.cols + 40] = bad;
    GroupCodes codes({4, 32, false, DType::kBF16}, p.rows, p.cols);
    EXPECT_FALSE(round_matrix(p.matrix, pool, codes));
    const InputMoments moments(p.cols, p.sums.data(), 0.01, pool);
    EXPECT_FALSE(round_with_feedback(p.matrix, moments, pool, codes));
  }
}

TEST(UpperRoot, MultipliesBack) {
  ThreadPool pool(2);
  for (const int64_t n : {1, 2, 63, 64, 65, 200}) {
    std::mt19937 random(static_cast<uint32_t>(n));
    std::normal_distribution<double> normal;
    Doubles x(n * n), a(n * n, 0.0);
    for (double& v : x) v = normal(random);
    for (int64_t i = 0; i < n; i++) {
      for (int64_t j = 0; j < n; j++) {
        for (int64_t k = 0; k < n; k++) a[i * n + j] += x[i * n + k] * x[j * n + k];
        a[i * n + j] += i == j ? 1 : 0;
      }
    }
    Doubles root = a;
    ASSERT_TRUE(upper_root(n, root, pool));
    for (int64_t i = 0; i < n; i++) {
      for (int64_t j = i; j < n; j++) {
        double sum = 0;
        for (int64_t k = j; k < n; k++) sum += root[i * n + k] * root[j * n + k];
        ASSERT_NEAR(sum, a[i * n + j], 1e-12 * a[0] * static_cast<double>(n)) << n << " " << i;
      }
    }
    a[(n - 1) * n + n - 1] = -1;
    EXPECT_FALSE(upper_root(n, a, pool));
  }
}

}  // namespace
}  // namespace mustafar
