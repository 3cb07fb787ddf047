// The dense CPU kernels of every instruction set this machine runs, against plain double sums.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/linear.h"

namespace mustafar {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  std::vector<float> normal(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> x(n);
    for (float& v : x) v = distribution(engine_);
    return x;
  }

 private:
  std::mt19937 engine_;
};

// x as stored in dtype.
std::vector<uint8_t> stored(const std::vector<float>& x, DType dtype) {
  std::vector<uint8_t> bytes(dtype_bytes(dtype, static_cast<int64_t>(x.size())));
  for (size_t i = 0; i < x.size(); i++) store_float(bytes.data(), dtype, i, x[i]);
  return bytes;
}

std::string test_name(const testing::TestParamInfo<Isa>& info) { return isa_name(info.param); }

class CpuKernels : public testing::TestWithParam<Isa> {
 protected:
  const Kernels kernels_ = select_kernels(GetParam());

  // The kernel's product of one task.
  void gemv(GemvArgs args) const {
    HostBuffer terms;
    if (args.dtype == DType::kBF16 && kernels_.split_terms != nullptr) {
      terms.ensure(kernels_.terms_bytes(args.batch, args.cols));
      args.terms = terms.data();
      if (args.terms != nullptr) {
        kernels_.split_terms(args.x, args.x_stride, args.batch, args.cols, terms.data());
      }
    }
    kernels_.gemv(args);
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, CpuKernels, testing::ValuesIn(available_isas()), test_name);

constexpr int64_t kLengths[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257};

TEST_P(CpuKernels, RmsNorm) {
  Random random(1);
  for (int64_t n : kLengths) {
    const std::vector<float> x = random.normal(n), weight = random.normal(n);
    std::vector<float> out(n + 1, kNaN);
    kernels_.rms_norm(x.data(), weight.data(), 1e-5f, n, out.data());
    double square = 0;
    for (float v : x) square += double{v} * v;
    const double scale = 1.0 / std::sqrt(square / n + 1e-5);
    for (int64_t i = 0; i < n; i++) {
      const double expected = x[i] * scale * weight[i];
      EXPECT_NEAR(out[i], expected, 1e-6 * std::abs(expected)) << "n " << n << " i " << i;
    }
    EXPECT_TRUE(std::isnan(out[n])) << "wrote past the end, n " << n;
  }
}

TEST_P(CpuKernels, RowScores) {
  Random random(11);
  for (const int64_t n : {1, 2, 7, 16, 31, 64, 1023, 1024, 1500, 4111}) {
    std::vector<float> x = random.normal(n, 3.0f), p = random.normal(n, 3.0f);
    for (float& v : p) v -= 8.0f;
    if (n > 20) x[n - 3] = x[n / 3] = 40.0f;  // two that are largest
    float most = 0;
    int64_t at = -1;
    kernels_.row_max(x.data(), n, &most, &at);
    EXPECT_EQ(at, std::max_element(x.begin(), x.end()) - x.begin()) << n;
    EXPECT_EQ(most, x[at]) << n;

    const float shift = 2.5f;
    double sum = 0, divergence = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
      sum += std::exp(double{x[i]} - shift);
      const double term = std::exp(double{p[i]}) * (double{p[i]} - (double{x[i]} - shift));
      divergence += term;
      size += std::fabs(term);
    }
    EXPECT_NEAR(kernels_.exp_sum(x.data(), shift, n), sum, 1e-6 * sum) << n;
    EXPECT_NEAR(kernels_.divergence(p.data(), x.data(), shift, n), divergence, 2e-6 * size) << n;
  }

  std::vector<float> x = random.normal(100);
  x[40] = kNaN;
  float most = 0;
  int64_t at = -1;
  kernels_.row_max(x.data(), 100, &most, &at);
  x[40] = -1e30f;
  EXPECT_EQ(at, std::max_element(x.begin(), x.end()) - x.begin());
  x[40] = kNaN;
  EXPECT_TRUE(std::isnan(kernels_.exp_sum(x.data(), most, 100)));
}

TEST_P(CpuKernels, SiluMul) {
  std::vector<float> gate;
  for (float x = -120.0f; x <= 120.0f; x += 0.37f) gate.push_back(x);
  for (float x : {0.0f, -0.0f, 1e-30f, -1e-30f, 1e4f, -1e4f}) gate.push_back(x);
  const int64_t n = static_cast<int64_t>(gate.size());
  Random random(2);
  const std::vector<float> up = random.normal(n), gate_bias = random.normal(n),
                           up_bias = random.normal(n);
  for (bool bias : {false, true}) {
    std::vector<float> out(n + 1, kNaN);
    kernels_.silu_mul(gate.data(), up.data(), bias ? gate_bias.data() : nullptr,
                      bias ? up_bias.data() : nullptr, n, out.data());
    for (int64_t i = 0; i < n; i++) {
      const double g = bias ? gate[i] + gate_bias[i] : gate[i];
      const double u = bias ? up[i] + up_bias[i] : up[i];
      const double expected = g / (1.0 + std::exp(-g)) * u;
      EXPECT_NEAR(out[i], expected, 1e-6 * std::abs(expected) + 1e-30) << "gate " << g;
    }
    EXPECT_TRUE(std::isnan(out[n]));
  }
  const float bad = kNaN, one = 1.0f;
  float out = 0;
  kernels_.silu_mul(&bad, &one, nullptr, nullptr, 1, &out);
  EXPECT_TRUE(std::isnan(out));
}

TEST_P(CpuKernels, StoreAndScale) {
  Random random(3);
  for (int64_t n : kLengths) {
    const std::vector<float> x = random.normal(n), bias = random.normal(n), old = random.normal(n);
    for (bool with_bias : {false, true}) {
      for (bool add : {false, true}) {
        std::vector<float> out = old;
        out.push_back(kNaN);
        kernels_.store(x.data(), with_bias ? bias.data() : nullptr, n, add, out.data());
        for (int64_t i = 0; i < n; i++) {
          const float value = with_bias ? x[i] + bias[i] : x[i];
          EXPECT_EQ(out[i], add ? old[i] + value : value);
        }
        EXPECT_TRUE(std::isnan(out[n]));
      }
    }
    std::vector<float> out(n + 1, kNaN);
    kernels_.scale(x.data(), 1.7f, n, out.data());
    for (int64_t i = 0; i < n; i++) EXPECT_EQ(out[i], x[i] * 1.7f);
    EXPECT_TRUE(std::isnan(out[n]));
  }
}

TEST_P(CpuKernels, RopeTurnsHalves) {
  Random random(4);
  for (int32_t n : {2, 8, 10, 16, 64, 80, 128}) {
    const std::vector<float> x = random.normal(n), angle = random.normal(n / 2, 3.0f);
    std::vector<float> cos(n / 2), sin(n / 2), y = x;
    for (int i = 0; i < n / 2; i++) cos[i] = std::cos(angle[i]), sin[i] = std::sin(angle[i]);
    kernels_.rope(y.data(), cos.data(), sin.data(), n);
    for (int i = 0; i < n / 2; i++) {
      const double a = x[i], b = x[i + n / 2], c = cos[i], s = sin[i];
      EXPECT_NEAR(y[i], a * c - b * s, 1e-6);
      EXPECT_NEAR(y[i + n / 2], b * c + a * s, 1e-6);
    }
  }
}

TEST_P(CpuKernels, MultiplyRow) {
  Random random(5);
  for (int32_t n : {2, 8, 16, 64, 80, 128}) {
    const std::vector<float> x = random.normal(n), m = random.normal(int64_t{n} * n);
    std::vector<float> out(n + 1, kNaN);
    kernels_.multiply_row(x.data(), m.data(), n, out.data());
    for (int j = 0; j < n; j++) {
      double sum = 0, size = 0;
      for (int i = 0; i < n; i++) {
        sum += double{x[i]} * m[i * n + j];
        size += std::abs(double{x[i]} * m[i * n + j]);
      }
      EXPECT_NEAR(out[j], sum, 1e-6 * size);
    }
    EXPECT_TRUE(std::isnan(out[n]));
  }
}

TEST_P(CpuKernels, ConversionsAreThoseOfTheScalarCode) {
  std::vector<float> x = {
      0.0f,  -0.0f,  1.0f,       65504.0f, 65520.0f,
      1e-8f, 6e-8f,  -3e-6f,     3.4e38f,  -std::numeric_limits<float>::infinity(),
      kNaN,  1e-40f, 1.00390625f};
  Random random(6);
  for (float v : random.normal(300, 100.0f)) x.push_back(v);
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (int64_t n : kLengths) {
      std::vector<uint8_t> expected = stored({x.begin(), x.begin() + n}, dtype);
      std::vector<uint8_t> got(expected.size());
      kernels_.from_f32(x.data(), n, dtype, got.data());
      EXPECT_EQ(got, expected) << dtype_name(dtype) << " n " << n;
      std::vector<float> back(n + 1, kNaN);
      kernels_.to_f32(expected.data(), dtype, n, back.data());
      for (int64_t i = 0; i < n; i++) {
        const float value = load_float(expected.data(), dtype, i);
        EXPECT_TRUE(back[i] == value || (std::isnan(back[i]) && std::isnan(value))) << x[i];
      }
      EXPECT_TRUE(std::isnan(back[n]));
    }
  }
}

// A layer and inputs of it, with exact sums.
struct Problem {
  int64_t rows, cols, batch;
  DType dtype;
  std::vector<float> x, bias;
  std::vector<uint8_t> w;
  Matrix matrix;
  std::vector<double> sum, size;  // [batch][rows]: the product and the sum of its terms' magnitudes

  Problem(int64_t rows, int64_t cols, int64_t batch, DType dtype, uint32_t seed)
      : rows(rows), cols(cols), batch(batch), dtype(dtype) {
    Random random(seed);
    x = random.normal(batch * cols);
    bias = random.normal(rows);
    w = stored(random.normal(rows * cols), dtype);
    matrix = {w.data(), dtype, rows, cols};
    for (int64_t b = 0; b < batch; b++) {
      for (int64_t r = 0; r < rows; r++) {
        double s = 0, m = 0;
        for (int64_t c = 0; c < cols; c++) {
          const double term = double{load_float(w.data(), dtype, r * cols + c)} * x[b * cols + c];
          s += term;
          m += std::abs(term);
        }
        sum.push_back(s);
        size.push_back(m);
      }
    }
  }

  // tolerance: of an error, relative to the sum of magnitudes.
  void check(const std::vector<float>& y, const std::vector<float>& before, bool with_bias,
             double tolerance, const std::string& what) const {
    for (int64_t b = 0; b < batch; b++) {
      for (int64_t r = 0; r < rows; r++) {
        const int64_t i = b * rows + r;
        double expected = sum[i] + (with_bias ? bias[r] : 0.0f);
        if (!before.empty()) expected += before[i];
        ASSERT_NEAR(y[i], expected, tolerance * (size[i] + 2.0))
            << what << ": row " << b << " output " << r << " of " << batch << " x " << rows << ", "
            << cols << " inputs, " << dtype_name(dtype);
      }
    }
  }
};

constexpr DType kWeightTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

TEST_P(CpuKernels, GemvSumsAndDoesNotDependOnTheBatch) {
  ThreadPool pool(1);
  CpuWorkspace workspace;
  for (DType dtype : kWeightTypes) {
    for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {3, 7}, {4, 16}, {5, 33}, {7, 63}, {66, 100}, {13, 1000}}) {
      for (int64_t batch : {1, 2, 3, 5, 7, 16}) {
        const Problem p(rows, cols, batch, dtype, 10);
        std::vector<float> y(batch * rows, kNaN);
        const LinearLayer layer{&p.matrix, p.bias.data(), y.data(), rows, false};
        decode_linear(pool, kernels_, {&layer, 1}, p.x.data(), cols, batch, /*int8_input=*/true,
                      workspace);
        p.check(y, {}, true, 1e-6, "gemv");
        for (int64_t b = 0; b < batch; b++) {
          std::vector<float> one(rows, kNaN);
          GemvArgs args;
          args.weights = p.w.data();
          args.dtype = dtype;
          args.cols = cols;
          args.row1 = rows;
          args.x = p.x.data() + b * cols;
          args.batch = 1;
          args.bias = p.bias.data();
          args.y = one.data();
          gemv(args);
          ASSERT_EQ(std::memcmp(one.data(), y.data() + b * rows, rows * sizeof(float)), 0)
              << "batch " << batch << " row " << b;
        }
      }
    }
  }
}

// Weights at an address that only their element's alignment divides, ending where they end.
TEST_P(CpuKernels, GemvTakesUnalignedWeights) {
  Random random(11);
  for (DType dtype : kWeightTypes) {
    const std::vector<float> values = random.normal(6 * 45), x = random.normal(45);
    const int64_t element = dtype_bytes(dtype, 1);
    std::vector<uint8_t> bytes(element + 6 * 45 * element);
    const std::vector<uint8_t> w = stored(values, dtype);
    std::memcpy(bytes.data() + element, w.data(), w.size());
    float aligned[6], shifted[6];
    GemvArgs args;
    args.dtype = dtype;
    args.cols = 45;
    args.row1 = 6;
    args.x = x.data();
    args.batch = 1;
    args.weights = w.data();
    args.y = aligned;
    gemv(args);
    args.weights = bytes.data() + element;
    args.y = shifted;
    gemv(args);
    EXPECT_EQ(std::memcmp(aligned, shifted, sizeof(aligned)), 0);
  }
}

void poison(CpuWorkspace& workspace) {
  for (HostBuffer* buffer : {&workspace.normed, &workspace.packed, &workspace.gated}) {
    if (buffer->bytes() > 0) std::memset(buffer->data(), 0xff, buffer->bytes());
  }
  for (HostBuffer& buffer : workspace.workers) std::memset(buffer.data(), 0xff, buffer.bytes());
}

TEST_P(CpuKernels, GemmOverShapesTypesAndPoisonedScratch) {
  ThreadPool pool(1);
  for (const GemmKernels* gemm : {&kernels_.f32, &kernels_.bf16}) {
    if (gemm->rows == 0) continue;
    for (DType dtype : kWeightTypes) {
      // bf16 rounds inputs to 2^-9, and other weights too.
      const double tolerance = gemm->unit == 1 ? 1e-6 : dtype == DType::kBF16 ? 0x1p-9 : 0x1p-8;
      for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {5, 3}, {32, 64}, {33, 65}, {150, 31}, {70, 700}}) {
        for (int64_t batch : {1, 2, 3, 7, 14, 15, 33}) {
          const Problem p(rows, cols, batch, dtype, 20);
          CpuWorkspace workspace;
          std::vector<float> first;
          for (int round = 0; round < 2; round++) {
            std::vector<float> y(batch * rows, kNaN);
            const LinearLayer layer{&p.matrix, p.bias.data(), y.data(), rows, false};
            const PackedInput x(*gemm, batch, cols, workspace.packed);
            for (int64_t panel = 0; panel < x.n_panels(); panel++) {
              x.pack(panel, p.x.data() + panel * gemm->rows * cols, cols);
            }
            prefill_linear(pool, kernels_, *gemm, {&layer, 1}, x, workspace);
            p.check(y, {}, true, tolerance, gemm->unit == 1 ? "f32 gemm" : "bf16 gemm");
            if (round == 0) first = y;
            EXPECT_EQ(std::memcmp(first.data(), y.data(), y.size() * sizeof(float)), 0);
            poison(workspace);
          }
        }
      }
    }
  }
}

TEST_P(CpuKernels, GemmAddsAndFusesSeveralLayers) {
  ThreadPool pool(3);
  const Problem a(100, 48, 512, DType::kBF16, 30);
  Problem b(17, 48, 512, DType::kBF16, 31);
  b.x = a.x;
  const Problem b_exact = [&] {
    Problem p = b;
    for (int64_t i = 0; i < p.batch; i++) {
      for (int64_t r = 0; r < p.rows; r++) {
        double s = 0, m = 0;
        for (int64_t c = 0; c < p.cols; c++) {
          const double term =
              double{load_float(p.w.data(), p.dtype, r * p.cols + c)} * p.x[i * p.cols + c];
          s += term;
          m += std::abs(term);
        }
        p.sum[i * p.rows + r] = s;
        p.size[i * p.rows + r] = m;
      }
    }
    return p;
  }();
  for (const GemmKernels* gemm : {&kernels_.f32, &kernels_.bf16}) {
    if (gemm->rows == 0) continue;
    const double tolerance = gemm->unit == 1 ? 1e-6 : 0x1p-9;
    CpuWorkspace workspace;
    Random random(32);
    const std::vector<float> before = random.normal(512 * 100);
    std::vector<float> y_a = before, y_b(512 * 17, kNaN);
    const LinearLayer layers[] = {{&a.matrix, nullptr, y_a.data(), 100, true},
                                  {&b_exact.matrix, b_exact.bias.data(), y_b.data(), 17, false}};
    const PackedInput x(*gemm, 512, 48, workspace.packed);
    for (int64_t panel = 0; panel < x.n_panels(); panel++) {
      x.pack(panel, a.x.data() + panel * gemm->rows * 48, 48);
    }
    prefill_linear(pool, kernels_, *gemm, layers, x, workspace);
    a.check(y_a, before, false, tolerance, "added");
    b_exact.check(y_b, {}, true, tolerance, "second layer");
  }
}

TEST(CpuIsa, OverrideNamesWhatIsWrong) {
  const char* before = std::getenv("MUSTAFAR_ISA");
  const std::string saved = before != nullptr ? before : "";
  setenv("MUSTAFAR_ISA", "scalar", 1);
  EXPECT_EQ(detect_isa(), Isa::kScalar);
  setenv("MUSTAFAR_ISA", "sse9", 1);
  EXPECT_THROW(
      {
        try {
          detect_isa();
        } catch (const std::invalid_argument& error) {
          EXPECT_NE(std::string(error.what()).find("sse9"), std::string::npos);
          throw;
        }
      },
      std::invalid_argument);
#if defined(__x86_64__)
  setenv("MUSTAFAR_ISA", "neon", 1);
  EXPECT_THROW(detect_isa(), std::invalid_argument);
#endif
  unsetenv("MUSTAFAR_ISA");
  EXPECT_EQ(detect_isa(), available_isas().back());
  if (before != nullptr) setenv("MUSTAFAR_ISA", saved.c_str(), 1);
}

}  // namespace
}  // namespace mustafar
