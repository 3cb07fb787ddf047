// Linear layers on the GPU at the shapes of Llama 3 8B: GEMV at 1 to 16 rows against the bytes of
// the weights, of bf16 and of codes, products with codes of 9 to 128 rows ("gemm", row warps x
// column warps of a block), and the products of many rows against each other. Prints JSON
// lines; each result is first held against GEMV in f32 arithmetic, and that against sums in f64.
// The exit status is 1 if one was wrong.
//
//   mustafar_cuda_linear_bench [seconds per measurement [layer]]
//
// A step is a graph of one product per copy of the weights, enough copies to exceed the L2 many
// times.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "bench/cuda_timing.h"
#include "core/dtype.h"
#include "cuda/cublaslt.h"
#include "cuda/linear.h"
#include "mustafar/error.h"

namespace {

using namespace mustafar;
using namespace mustafar::cuda;

constexpr int64_t kColdBytes = int64_t{1} << 29;
constexpr int64_t kScratchBytes = int64_t{32} << 20;

// Of a matrix of codes in front of another.
int64_t room_of(const QuantisedShape& shape) {
  return (shape.bytes() + kLineBytes - 1) / kLineBytes * kLineBytes;
}

struct Layer {
  const char* name;
  std::vector<int64_t> rows;  // of each matrix of the launch
  int64_t cols;
  bool add;
};

class Bench {
 public:
  Bench(double budget, Stream stream, double bandwidth)
      : budget_(budget), stream_(stream), bandwidth_(bandwidth), product_(CublasLt::open()) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    table_.resize(1 << 16);
    for (float& x : table_) x = normal(random);
  }

  // Makes the layer's matrices, which the runs that follow use.
  void prepare(const Layer& layer) {
    copy_values_ = 0;
    for (const int64_t r : layer.rows) copy_values_ += r * layer.cols;
    copies_ = std::max<int64_t>(2, kColdBytes / (2 * copy_values_) + 1);
    std::mt19937 random(7);
    host_.resize(copy_values_);
    const int64_t fresh = std::min<int64_t>(copy_values_, 5 << 20);  // the rest repeats it
    for (int64_t i = 0; i < fresh; i++) host_[i] = f32_to_bf16(0.02f * table_[random() & 0xffff]);
    for (int64_t i = fresh; i < copy_values_; i++) host_[i] = host_[i - fresh];
    uint16_t* const weights = weights_.ensure<uint16_t>(copy_values_ * copies_);
    copy_to_device(weights, host_.data(), copy_values_ * 2, stream_);
    for (int64_t c = 1; c < copies_; c++) {
      copy_on_device(weights + c * copy_values_, weights, copy_values_ * 2, stream_);
    }
  }

  // The same of codes: f16 scales, and minimums where offset says so.
  void prepare_codes(const Layer& layer, DType dtype, int32_t group, Offset offset) {
    shapes_.clear();
    int64_t bytes = 0;
    for (const int64_t r : layer.rows) {
      shapes_.push_back({dtype, DType::kF16, offset, group, r, layer.cols});
      bytes += room_of(shapes_.back());
    }
    copy_bytes_ = bytes;
    copies_ = std::max<int64_t>(2, kColdBytes / bytes + 1);
    codes_.resize(bytes);
    std::mt19937 random(7);
    const int64_t fresh = std::min<int64_t>(bytes, 5 << 20);
    for (int64_t i = 0; i < fresh; i++) codes_[i] = static_cast<uint8_t>(random());
    for (int64_t i = fresh; i < bytes; i++) codes_[i] = codes_[i - fresh];
    int64_t at = 0;
    for (const QuantisedShape& shape : shapes_) {
      for (int64_t i = 0; i < shape.n_scales(); i++) {
        const float scale = 0.001f * (1.0f + static_cast<float>(random() % 64) / 64.0f);
        store_float(&codes_[at + shape.scales_at()], DType::kF16, i, scale);
        if (offset == Offset::kMinimums) {
          store_float(&codes_[at + shape.offsets_at()], DType::kF16, i, -8.0f * scale);
        }
      }
      at += room_of(shape);
    }
    uint8_t* const device = weights_.ensure<uint8_t>(bytes * copies_);
    copy_to_device(device, codes_.data(), bytes, stream_);
    for (int64_t c = 1; c < copies_; c++) {
      copy_on_device(device + c * bytes, device, bytes, stream_);
    }
  }

  bool run_codes(const Layer& layer, int32_t n) {
    int64_t rows = 0;
    for (const int64_t r : layer.rows) rows += r;
    const std::vector<float> x = make_input(layer, n);
    float* const y = y_.ensure<float>(n * rows);
    const auto args_of = [&](int64_t copy, bool add) {
      LinearArgs args;
      args.cols = layer.cols;
      args.x = static_cast<const float*>(x_.data());
      args.n = n;
      const uint8_t* memory = static_cast<const uint8_t*>(weights_.data()) + copy * copy_bytes_;
      float* out = y;
      for (const QuantisedShape& shape : shapes_) {
        const Matrix m = Matrix::of(shape, memory);
        args.parts[args.n_parts++] = part_of(m, nullptr, out, add);
        memory += room_of(shape);
        out += n * m.rows;
      }
      return args;
    };
    void* const packed = packed_.ensure<uint16_t>(n * layer.cols);
    void* const scratch = scratch_.ensure<uint8_t>(kScratchBytes);
    const int64_t slice_rows = expanded_rows(layer.cols);
    void* const values = values_.ensure<uint16_t>(slice_rows * layer.cols);
    round_to(DType::kBF16, static_cast<const float*>(x_.data()), n * layer.cols, packed, stream_);
    const auto by_gemv = [&](const LinearArgs& args) { gemv(args, stream_); };
    void* const gemm_scratch =
        gemm_scratch_.ensure<uint8_t>(gemm_quantised_scratch_bytes(args_of(0, false)));
    const auto by_gemm = [&](const LinearArgs& args) {
      gemm_quantised(args, gemm_scratch, stream_);
    };
    const auto by_product = [&](const LinearArgs& args) {
      for (int i = 0; i < args.n_parts; i++) {
        const LinearPart& part = args.parts[i];
        for (int64_t first = 0; first < part.rows; first += slice_rows) {
          const int64_t count = std::min(slice_rows, part.rows - first);
          expand_codes(part, args.cols, first, count, DType::kBF16, values, stream_);
          const LinearPart slice{values,         DType::kBF16,  count,          nullptr,
                                 part.y + first, part.y_stride, part.accumulate};
          if (!product_->multiply(slice, packed, n, args.cols, scratch, kScratchBytes, stream_)) {
            throw Error("cuBLASLt has no kernel for this shape");
          }
        }
      }
    };
    bool good = true;
    // Activations and weights rounded to bf16 come within 2^-8 of each product.
    const auto measure = [&](const char* kernel, auto&& body, double tolerance) {
      fill_bytes(y, 0xff, n * rows * 4, stream_);
      body(args_of(0, false));
      std::vector<float> out(n * rows);
      copy_to_host(out.data(), y, n * rows * 4, stream_);
      synchronize(stream_);
      const bool right = codes_agree_with_host(out, x, n, tolerance);
      good = good && right;
      const Graph graph = record_graph(stream_, [&] {
        for (int64_t c = 0; c < copies_; c++) body(args_of(c, layer.add));
      });
      const double seconds = seconds_of(stream_, graph, budget_) / static_cast<double>(copies_);
      destroy_graph(graph);
      const QuantisedShape& shape = shapes_[0];
      const double bytes = static_cast<double>(copy_bytes_);
      std::printf(
          "{\"kernel\": \"%s %s:%d%s\", \"layer\": \"%s\", \"rows\": %d, \"us\": %.3f, "
          "\"bandwidth\": %.4g, \"of_copy\": %.3f, \"tflops\": %.1f, \"right\": %s}\n",
          kernel, dtype_name(shape.dtype), shape.group,
          shape.offset == Offset::kMinimums ? " minimums" : "", layer.name, n, seconds * 1e6,
          bytes / seconds, bytes / seconds / bandwidth_,
          2.0 * static_cast<double>(rows * layer.cols) * n / seconds * 1e-12,
          right ? "true" : "false");
      std::fflush(stdout);
    };
    if (n <= 16) measure("gemv", by_gemv, 2e-5);
    if (n > 8 && n <= 128) measure("gemm", by_gemm, 2e-5);
    if (n >= 16 && product_ != nullptr) {
      measure("expanded", by_product, 1e-2);
    }
    return good;
  }

  bool run(const Layer& layer, int32_t n) {
    const int64_t rows = copy_values_ / layer.cols;
    uint16_t* const weights = static_cast<uint16_t*>(weights_.data());
    const std::vector<float> x = make_input(layer, n);
    const float* const device_x = static_cast<const float*>(x_.data());
    float* const y = y_.ensure<float>(n * rows);
    void* const packed = packed_.ensure<uint16_t>(n * layer.cols);
    void* const scratch = scratch_.ensure<uint8_t>(kScratchBytes);
    round_to(DType::kBF16, device_x, n * layer.cols, packed, stream_);

    const auto args_of = [&](int64_t copy, bool add) {
      LinearArgs args;
      int64_t at = 0;
      for (const int64_t r : layer.rows) {
        args.parts[args.n_parts++] = {weights + copy * copy_values_ + at * layer.cols,
                                      DType::kBF16,
                                      r,
                                      nullptr,
                                      y + at * n,
                                      r,
                                      add};
        at += r;
      }
      args.cols = layer.cols;
      args.x = device_x;
      args.n = n;
      return args;
    };
    const auto result = [&](auto&& body) {
      fill_bytes(y, 0xff, n * rows * 4, stream_);
      body(args_of(0, false));
      std::vector<float> out(n * rows);
      copy_to_host(out.data(), y, n * rows * 4, stream_);
      synchronize(stream_);
      return out;
    };
    const auto by_gemv = [&](const LinearArgs& args) { gemv(args, stream_); };
    const auto by_gemm = [&](const LinearArgs& args) {
      LinearArgs rounded = args;
      rounded.rounded = packed;
      gemm(rounded, stream_);
    };
    const auto by_product = [&](const LinearArgs& args) {
      for (int i = 0; i < args.n_parts; i++) {
        if (!product_->multiply(args.parts[i], packed, n, args.cols, scratch, kScratchBytes,
                                stream_)) {
          throw Error("cuBLASLt has no kernel for this shape");
        }
      }
    };
    // GEMV in f32, the reference, is itself held against f64 sums of the host in a few rows.
    const std::vector<float> reference = result(by_gemv);
    bool good = agrees_with_host(reference, host_, x, layer, n);
    const auto measure = [&](const char* kernel, auto&& body, double tolerance) {
      const std::vector<float> out = result(body);
      double error = 0, power = 0;
      for (size_t i = 0; i < out.size(); i++) {
        error += (out[i] - reference[i]) * (out[i] - reference[i]);
        power += reference[i] * reference[i];
      }
      const bool right = error <= tolerance * power;
      good = good && right;
      const Graph graph = record_graph(stream_, [&] {
        for (int64_t c = 0; c < copies_; c++) body(args_of(c, layer.add));
      });
      const double seconds = seconds_of(stream_, graph, budget_) / static_cast<double>(copies_);
      destroy_graph(graph);
      const double bytes = 2.0 * static_cast<double>(copy_values_);
      std::printf(
          "{\"kernel\": \"%s\", \"layer\": \"%s\", \"rows\": %d, \"us\": %.3f, \"bandwidth\": "
          "%.4g, "
          "\"of_copy\": %.3f, \"tflops\": %.1f, \"right\": %s}\n",
          kernel, layer.name, n, seconds * 1e6, bytes / seconds, bytes / seconds / bandwidth_,
          bytes * n / seconds * 1e-12, right ? "true" : "false");
      std::fflush(stdout);
    };
    if (n <= kGemvRows) measure("gemv", by_gemv, 1e-10);
    if (n > 1) {
      measure("own gemm", by_gemm, 1e-4);
      if (product_ != nullptr) measure("cuBLASLt", by_product, 1e-4);
    }
    if (!good)
      std::printf("{\"layer\": \"%s\", \"rows\": %d, \"error\": \"wrong\"}\n", layer.name, n);
    return good;
  }

 private:
  // Some outputs of the first and last matrix against sums in f64.
  static bool agrees_with_host(const std::vector<float>& out, const std::vector<uint16_t>& weights,
                               const std::vector<float>& x, const Layer& layer, int32_t n) {
    int64_t at = 0;
    for (const int64_t rows : layer.rows) {
      for (const int64_t row : {int64_t{0}, int64_t{5}, rows / 2, rows - 1}) {
        for (const int32_t b : {0, n - 1}) {
          double sum = 0, power = 0;
          for (int64_t i = 0; i < layer.cols; i++) {
            const double product =
                double{bf16_to_f32(weights[(at + row) * layer.cols + i])} * x[b * layer.cols + i];
            sum += product;
            power += product * product;
          }
          if (!(std::fabs(out[at * n + b * rows + row] - sum) <= 2e-5 * std::sqrt(power)))
            return false;
        }
      }
      at += rows;
    }
    return true;
  }

  // The same of matrices of codes.
  bool codes_agree_with_host(const std::vector<float>& out, const std::vector<float>& x, int32_t n,
                             double tolerance) const {
    const uint8_t* memory = codes_.data();
    const float* y = out.data();
    for (const QuantisedShape& shape : shapes_) {
      const Matrix m = Matrix::of(shape, memory);
      for (const int64_t row : {int64_t{0}, int64_t{5}, shape.rows / 2, shape.rows - 1}) {
        for (const int32_t b : {0, n - 1}) {
          double sum = 0, power = 0;
          for (int64_t i = 0; i < shape.cols; i++) {
            const float weight = m.weight(code_at(shape, memory, row, i), scale_at(shape, row, i));
            const double product = double{weight} * x[b * shape.cols + i];
            sum += product;
            power += product * product;
          }
          if (!(std::fabs(y[b * shape.rows + row] - sum) <= tolerance * std::sqrt(power))) {
            return false;
          }
        }
      }
      memory += room_of(shape);
      y += n * shape.rows;
    }
    return true;
  }

  // x of n rows, on the device too.
  std::vector<float> make_input(const Layer& layer, int32_t n) {
    std::mt19937 random(static_cast<uint32_t>(n));
    std::vector<float> x(n * layer.cols);
    for (float& value : x) value = table_[random() & 0xffff];
    copy_to_device(x_.ensure<float>(n * layer.cols), x.data(), static_cast<int64_t>(x.size()) * 4,
                   stream_);
    synchronize(stream_);
    return x;
  }

  double budget_;
  Stream stream_;
  double bandwidth_;
  std::unique_ptr<CublasLt> product_;
  std::vector<float> table_;
  std::vector<uint16_t> host_;
  std::vector<QuantisedShape> shapes_;  // of the layer's matrices of codes
  std::vector<uint8_t> codes_;
  int64_t copy_values_ = 0, copy_bytes_ = 0, copies_ = 0;
  DeviceBuffer weights_, x_, y_, packed_, scratch_, values_, gemm_scratch_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    const double budget = argc > 1 ? std::atof(argv[1]) : 0.1;
    const std::vector<Layer> layers = {{"q, k, v", {4096, 1024, 1024}, 4096, false},
                                       {"o", {4096}, 4096, true},
                                       {"gate, up", {14336, 14336}, 4096, false},
                                       {"down", {4096}, 14336, true},
                                       {"lm_head", {128256}, 4096, false}};
    const DeviceProperties device = open_device();
    const Stream stream = make_stream();
    const double bandwidth = copy_bandwidth(stream, budget);
    std::printf("{\"device\": \"%s\", \"copy_bandwidth\": %.4g}\n", device.name.c_str(), bandwidth);
    Bench bench(budget, stream, bandwidth);
    bool good = true;
    for (const Layer& layer : layers) {
      if (argc > 2 && std::strcmp(argv[2], layer.name) != 0) continue;
      bench.prepare(layer);
      for (const int32_t n : {1, 2, 4, 8, 16, 64, 512, 2048}) {
        if (n > 64 && layer.rows[0] > 100000) continue;  // logits of a whole prompt are never asked
        good = bench.run(layer, n) && good;
      }
      struct Codes {
        DType dtype;
        int32_t group;
        Offset offset;
      };
      for (const auto& [dtype, group, offset] :
           {Codes{DType::kInt4, 32, Offset::kMinimums}, Codes{DType::kInt4, 128, Offset::kNone},
            Codes{DType::kInt8, 32, Offset::kMinimums}}) {
        bench.prepare_codes(layer, dtype, group, offset);
        for (const int32_t n : {1, 2, 8, 16, 32, 64, 128, 512, 2048}) {
          if (n > 64 && layer.rows[0] > 100000) continue;
          good = bench.run_codes(layer, n) && good;
        }
      }
    }
    destroy_stream(stream);
    return good ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
