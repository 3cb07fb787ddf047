// Micro benchmark of the dense CPU kernels: GEMV against the measured read bandwidth, GEMM and
// prefill attention against the measured peak of multiply-adds. Cases take turns; medians are
// printed.
//
//   mustafar_kernel_bench [--threads N] [--rounds N] [--cpu-time] [--filter TEXT]
//
// --cpu-time: one thread, processor time in place of wall time, for a machine that others use too.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "backend/cpu/attention/prefill.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/linear.h"
#include "core/buffer.h"
#include "core/thread_pool.h"

namespace mustafar {
namespace {

bool g_cpu_time = false;

double now() {
  timespec t;
  clock_gettime(g_cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Results go here, so that the compiler keeps the work.
volatile float g_sink;

#if defined(__x86_64__)
// What one thread computes in registers, in independent chains: more than are in flight at a time.
// Each returns the floating-point operations that it did: two a lane and multiply-add.
constexpr int kChains = 12;

__attribute__((target("avx512f"))) double fma_avx512(int64_t n) {
  __m512 s[kChains];
  for (int i = 0; i < kChains; i++) s[i] = _mm512_set1_ps(0.5f + i);
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
  for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 12  // kChains
    for (int j = 0; j < kChains; j++) s[j] = _mm512_fmadd_ps(s[j], a, b);
  }
  for (int i = 1; i < kChains; i++) s[0] = _mm512_add_ps(s[0], s[i]);
  g_sink = _mm512_cvtss_f32(s[0]);
  return 2.0 * n * kChains * 16;
}
__attribute__((target("avx512f,avx512bf16"))) double dot_avx512bf16(int64_t n) {
  __m512 s[kChains];
  for (int i = 0; i < kChains; i++) s[i] = _mm512_set1_ps(0.5f + i);
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x00003f80), b = (__m512bh)_mm512_set1_epi32(0);
  for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 12  // kChains
    for (int j = 0; j < kChains; j++) s[j] = _mm512_dpbf16_ps(s[j], a, b);
  }
  for (int i = 1; i < kChains; i++) s[0] = _mm512_add_ps(s[0], s[i]);
  g_sink = _mm512_cvtss_f32(s[0]);
  return 2.0 * n * kChains * 32;
}
__attribute__((target("amx-tile,amx-bf16"))) double dot_amx(int64_t n) {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static const Config kConfig;
  _tile_loadconfig(&kConfig);  // and makes the tiles zero
  constexpr int kTiles = 4;    // of 16 x 16 sums, over 32 products each
  for (int64_t i = 0; i < n; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * n * kTiles * 16 * 16 * 32;
}
__attribute__((target("avx2,fma"))) double fma_avx2(int64_t n) {
  __m256 s[kChains];
  for (int i = 0; i < kChains; i++) s[i] = _mm256_set1_ps(0.5f + i);
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
  for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 12  // kChains
    for (int j = 0; j < kChains; j++) s[j] = _mm256_fmadd_ps(s[j], a, b);
  }
  for (int i = 1; i < kChains; i++) s[0] = _mm256_add_ps(s[0], s[i]);
  g_sink = _mm256_cvtss_f32(s[0]);
  return 2.0 * n * kChains * 8;
}
#endif

typedef float Vector4 __attribute__((vector_size(16)));

// Four floats at a time, which is enough to wait for memory.
double read_floats(const float* x, int64_t n) {
  const Vector4* v = reinterpret_cast<const Vector4*>(x);
  Vector4 s[8] = {};
  for (int64_t i = 0; i < n / 4; i += 8) {
    __builtin_prefetch(v + i + 256, 0, 2);
    __builtin_prefetch(v + i + 260, 0, 2);
    for (int j = 0; j < 8; j++) s[j] += v[i + j];
  }
  for (int j = 1; j < 8; j++) s[0] += s[j];
  g_sink = s[0][0] + s[0][1] + s[0][2] + s[0][3];
  return 4.0 * n;
}

struct Case {
  std::string name;
  const char* unit;             // "GB/s" or "GFLOP/s"
  std::string limit;            // the case whose rate is this one's ceiling, or empty
  std::function<double()> run;  // returns bytes or operations done
  std::vector<double> rates = {};
  double median() const {
    std::vector<double> r = rates;
    std::sort(r.begin(), r.end());
    return r.empty() ? 0 : r[r.size() / 2];
  }
};

struct Bench {
  explicit Bench(int threads) : pool(threads), isa(detect_isa()), kernels(select_kernels(isa)) {}

  ThreadPool pool;
  Isa isa;
  Kernels kernels;
  CpuWorkspace workspace;
  HostBuffer memory;  // weights, larger than the caches
  int64_t at = 0;     // next unused byte
  HostBuffer x, y;
  std::vector<Case> cases;

  // The next `bytes` of memory: successive calls go round, so that nothing is found in a cache.
  void* take(int64_t bytes) {
    bytes = (bytes + 127) / 128 * 128;
    if (at + bytes > static_cast<int64_t>(memory.bytes())) at = 0;
    void* start = memory.as<uint8_t>() + at;
    at += bytes;
    return start;
  }

  void add_limits() {
    cases.push_back({"read", "GB/s", "", [this] {
                       const int64_t bytes = 64 << 20, n = pool.size();
                       const float* data = static_cast<const float*>(take(bytes));
                       pool.parallel_for(n, [&](int64_t i, int) {
                         read_floats(data + i * (bytes / n / 4), bytes / n / 4 / 32 * 32);
                       });
                       return static_cast<double>(bytes);
                     }});
    [[maybe_unused]] const auto peak = [this](const char* name, double (*loop)(int64_t)) {
      cases.push_back({name, "GFLOP/s", "", [this, loop] {
                         std::vector<double> done(pool.size());
                         pool.parallel_for(pool.size(),
                                           [&](int64_t i, int) { done[i] = loop(500000); });
                         double sum = 0;
                         for (double d : done) sum += d;
                         return sum;
                       }});
    };
#if defined(__x86_64__)
    if (isa >= Isa::kAvx512) {
      peak("peak f32", fma_avx512);
    } else if (isa == Isa::kAvx2) {
      peak("peak f32", fma_avx2);
    }
    if (isa == Isa::kAvx512Bf16) peak("peak bf16", dot_avx512bf16);
    if (isa == Isa::kAmx) peak("peak bf16", dot_amx);
#endif
  }

  void add_gemv(DType dtype, int64_t rows, int64_t cols, int32_t batch) {
    const std::string name = std::string("gemv ") + dtype_name(dtype) + " " + std::to_string(rows) +
                             "x" + std::to_string(cols) + " batch " + std::to_string(batch);
    cases.push_back({name, "GB/s", "read", [=, this] {
                       const int64_t bytes = dtype_bytes(dtype, rows * cols);
                       const int64_t count = std::max<int64_t>(1, (32 << 20) / bytes);
                       for (int64_t i = 0; i < count; i++) {
                         const Matrix w{take(bytes), dtype, rows, cols};
                         const LinearLayer layer{&w, nullptr, y.as<float>(), rows, false};
                         decode_linear(pool, kernels, {&layer, 1}, x.as<float>(), cols, batch, true,
                                       workspace);
                       }
                       return static_cast<double>(bytes * count);
                     }});
  }

  // Of a quantised matrix, over its bytes: codes and scales.
  void add_quantised_gemv(DType dtype, int32_t group, int64_t rows, int64_t cols, int32_t batch,
                          bool int8_input) {
    QuantisedShape shape;
    shape.dtype = dtype;
    shape.offset = Offset::kMinimums;  // as rounding on loading makes them
    shape.group = group;
    shape.rows = rows;
    shape.cols = cols;
    const std::string name = std::string("gemv ") + dtype_name(dtype) + ":" +
                             std::to_string(group) + (int8_input ? "" : " f32 input") + " " +
                             std::to_string(rows) + "x" + std::to_string(cols) + " batch " +
                             std::to_string(batch);
    cases.push_back({name, "GB/s", "read", [=, this] {
                       const int64_t count = std::max<int64_t>(1, (32 << 20) / shape.bytes());
                       for (int64_t i = 0; i < count; i++) {
                         const Matrix w = Matrix::of(shape, take(shape.bytes()));
                         const LinearLayer layer{&w, nullptr, y.as<float>(), rows, false};
                         decode_linear(pool, kernels, {&layer, 1}, x.as<float>(), cols, batch,
                                       int8_input, workspace);
                       }
                       return static_cast<double>(shape.bytes() * count);
                     }});
  }

  void add_gemm(const GemmKernels& gemm, DType dtype, int64_t n, int64_t rows, int64_t cols) {
    if (gemm.rows == 0) return;
    const std::string type = gemm.unit == 2 ? "bf16" : "f32";
    const std::string name = "gemm " + type + " (" + dtype_name(dtype) + " weights) " +
                             std::to_string(n) + " x " + std::to_string(rows) + "x" +
                             std::to_string(cols);
    cases.push_back({name, "GFLOP/s", "peak " + type, [=, this, &gemm] {
                       Matrix w{nullptr, dtype, rows, cols};
                       w.group = 32;
                       if (w.quantised()) {
                         w = Matrix::of(w.shape(), take(w.shape().bytes()));
                       } else {
                         w.data = take(dtype_bytes(dtype, rows * cols));
                       }
                       const LinearLayer layer{&w, nullptr, y.as<float>(), rows, false};
                       const PackedInput packed(gemm, n, cols, workspace.packed);
                       pool.parallel_for(packed.n_panels(), [&](int64_t p, int) {
                         packed.pack(p, x.as<float>() + p * gemm.rows * cols, cols);
                       });
                       prefill_linear(pool, kernels, gemm, {&layer, 1}, packed, workspace);
                       return 2.0 * n * rows * cols;
                     }});
  }

  void add_attention(const GemmKernels& gemm, DType dtype, int32_t heads, int32_t kv_heads,
                     int32_t dim, int32_t before, int32_t rows) {
    if (gemm.rows == 0) return;
    const std::string type = gemm.unit == 2 ? "bf16" : "f32";
    const std::string name = "attention " + type + " " + std::to_string(heads) + "/" +
                             std::to_string(kv_heads) + " heads x " + std::to_string(dim) + ", " +
                             std::to_string(rows) + " after " + std::to_string(before);
    cases.push_back({name, "GFLOP/s", "peak " + type, [=, this, &gemm] {
                       SequenceStep step;
                       step.n_rows = rows;
                       step.pos0 = before;
                       step.fresh_capacity = before + rows;
                       step.fresh = static_cast<uint8_t*>(
                           take(dtype_bytes(dtype, int64_t{2} * kv_heads * (before + rows) * dim)));
                       PrefillAttentionArgs args;
                       args.n_heads = heads;
                       args.n_kv_heads = kv_heads;
                       args.head_dim = dim;
                       args.tail_dtype = dtype;
                       args.sequences = {&step, 1};
                       args.q = x.as<float>();
                       args.out = y.as<float>();
                       prefill_attention(pool, kernels, gemm, args, workspace);
                       return 4.0 * heads * dim * rows * (before + (rows + 1) / 2.0);
                     }});
  }
};

int run(int argc, char** argv) {
  int threads = 0, rounds = 9;
  std::string filter;
  for (int i = 1; i < argc; i++) {
    const std::string arg = argv[i];
    if (arg == "--cpu-time") {
      g_cpu_time = true;
    } else if (i + 1 < argc && arg == "--threads") {
      threads = std::atoi(argv[++i]);
    } else if (i + 1 < argc && arg == "--rounds") {
      rounds = std::atoi(argv[++i]);
    } else if (i + 1 < argc && arg == "--filter") {
      filter = argv[++i];
    } else {
      std::fprintf(stderr, "usage: %s [--threads N] [--rounds N] [--cpu-time] [--filter TEXT]\n",
                   argv[0]);
      return 2;
    }
  }
  if (g_cpu_time) threads = 1;

  Bench bench(threads);
  // Small numbers that are finite in every type.
  bench.memory = HostBuffer(size_t{320} << 20);
  for (size_t i = 0; i < bench.memory.bytes() / 2; i++) {
    bench.memory.as<uint16_t>()[i] = static_cast<uint16_t>(0x3c00 + i * 2654435761u % 0x180);
  }
  bench.x = HostBuffer(size_t{8192} * 1024 * 4);
  for (size_t i = 0; i < bench.x.bytes() / 4; i++) {
    bench.x.as<float>()[i] = static_cast<float>(i * 2654435761u % 2001) / 1000.0f - 1.0f;
  }
  bench.y = HostBuffer(size_t{8192} * 1024 * 4);

  bench.add_limits();
  for (DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    bench.add_gemv(dtype, 2048, 2048, 1);
    bench.add_gemv(dtype, 8192, 2048, 1);
    bench.add_gemv(dtype, 2048, 8192, 1);
  }
  for (int32_t batch : {2, 4, 8, 16}) bench.add_gemv(DType::kBF16, 8192, 2048, batch);
  for (int32_t batch : {1, 4, 16}) {  // of a small model
    bench.add_gemv(DType::kBF16, 1536, 576, batch);
    bench.add_gemv(DType::kBF16, 576, 1536, batch);
  }
  for (DType dtype : {DType::kInt8, DType::kInt4}) {
    for (int32_t group : {32, 128}) {
      bench.add_quantised_gemv(dtype, group, 8192, 2048, 1, true);
      bench.add_quantised_gemv(dtype, group, 2048, 8192, 1, true);
    }
    for (int32_t batch : {2, 4, 8, 16}) {
      bench.add_quantised_gemv(dtype, 32, 8192, 2048, batch, true);
    }
    bench.add_quantised_gemv(dtype, 32, 8192, 2048, 1, false);
  }
  const GemmKernels &bf16 = bench.kernels.bf16, &f32 = bench.kernels.f32;
  bench.add_gemm(bf16, DType::kBF16, 512, 2048, 2048);
  bench.add_gemm(bf16, DType::kBF16, 512, 8192, 2048);
  bench.add_gemm(bf16, DType::kBF16, 512, 2048, 8192);
  for (DType dtype : {DType::kInt8, DType::kInt4}) {
    bench.add_gemm(bf16, dtype, 512, 2048, 2048);
    bench.add_gemm(bf16, dtype, 512, 8192, 2048);
    bench.add_gemm(bf16, dtype, 512, 2048, 8192);
  }
  bench.add_gemm(bf16, DType::kBF16, 32, 8192, 2048);
  bench.add_gemm(bf16, DType::kBF16, 1, 8192, 2048);
  bench.add_gemm(f32, DType::kF32, 512, 2048, 2048);
  bench.add_gemm(f32, DType::kF16, 512, 8192, 2048);
  bench.add_gemm(f32, DType::kBF16, 512, 2048, 8192);
  bench.add_attention(bf16, DType::kBF16, 32, 8, 64, 0, 512);
  bench.add_attention(bf16, DType::kBF16, 32, 8, 64, 3584, 512);
  bench.add_attention(bf16, DType::kBF16, 32, 8, 128, 3584, 512);
  bench.add_attention(f32, DType::kF32, 32, 8, 64, 3584, 512);

  std::vector<Case*> chosen;
  for (Case& c : bench.cases) {
    if (c.limit.empty() || c.name.find(filter) != std::string::npos) chosen.push_back(&c);
  }
  for (int round = -1; round < rounds; round++) {  // the first one warms up
    for (Case* c : chosen) {
      const double start = now();
      const double done = c->run();
      const double rate = done / (now() - start) * 1e-9;
      if (round >= 0) c->rates.push_back(rate);
    }
  }
  std::printf("%s, %d threads, median of %d%s\n", isa_description(bench.isa), bench.pool.size(),
              rounds, g_cpu_time ? ", processor time" : "");
  for (Case* c : chosen) {
    double limit = 0;
    for (const Case& other : bench.cases) {
      if (other.name == c->limit) limit = other.median();
    }
    const auto [low, high] = std::minmax_element(c->rates.begin(), c->rates.end());
    std::printf("%-48s %8.1f %-7s (%.1f-%.1f)", c->name.c_str(), c->median(), c->unit, *low, *high);
    if (limit > 0) std::printf("  %3.0f %% of %s", 100 * c->median() / limit, c->limit.c_str());
    std::printf("\n");
  }
  return 0;
}

}  // namespace
}  // namespace mustafar

int main(int argc, char** argv) { return mustafar::run(argc, argv); }
