// Prefill attention on the GPU: time and TFLOP/s of one layer's attend over a chunk of a prompt,
// each shape checked against the plain kernel in some of its rows first. Prints JSON lines; one
// that could not be measured has an "error". The exit status is 1 if there was one, or a wrong
// result.
//
//   mustafar_cuda_prefill_bench [seconds per measurement] [shape ...]
//
// A shape is rows,before,prefix,heads,kv_heads[,setting]: the chunk's rows, the tokens of the same
// call before it (dense), the compressed tokens before the call (rounded down to whole blocks; 32
// more stay dense), and the number in kSettings of how those are stored (left out: all of them).
// Only the products of visible pairs count: 4 * head_dim for every query head, row and token that
// it sees.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "bench/cuda_timing.h"
#include "cuda/attention.h"
#include "cuda/buffer.h"
#include "cuda/compress.h"
#include "cuda/device.h"
#include "format/block_format.h"
#include "mustafar/error.h"

namespace {

using namespace mustafar;
using namespace mustafar::cuda;

constexpr int32_t kHeadDim = 128;
constexpr int32_t kWindow = 32;
constexpr int32_t kCapacity = kWindow + kBlockTokens;
constexpr int32_t kDistinctPages = 8;  // the rest of a prefix repeats them
constexpr int32_t kCheckedRows = 3;    // at the chunk's start, middle and end each
constexpr DType kTail = DType::kBF16;

struct Shape {
  int32_t rows, before, prefix, n_heads, n_kv_heads, setting;
};

struct Setting {
  const char* name;
  double k_sparsity, v_sparsity;
  DType values;
};

constexpr Setting kSettings[] = {{"bf16 37.5 %", 0.625, 0.75, DType::kBF16},
                                 {"int8 22.7 %", 0.625, 0.75, DType::kInt8},
                                 {"int4 19.5 %", 0.5, 0.5, DType::kInt4},
                                 {"bf16 dense", 0, 0, DType::kBF16}};
constexpr int32_t kAllSettings = -1;

// As the backend calls it.
bool attend(AttentionArgs args, Stream stream) {
  args.writes_out = true;
  return prefill_attention_fast(args, stream);
}

class NormalNumbers {
 public:
  explicit NormalNumbers(uint32_t seed) : random_(seed), table_(1 << 16) {
    std::normal_distribution<float> normal;
    for (float& x : table_) x = normal(random_);
  }
  float next() { return table_[random_() & 0xffff]; }
  void to_device(void* at, int64_t n, bool half, Stream stream) {
    std::vector<float> numbers(half ? 0 : n);
    std::vector<uint16_t> halves(half ? n : 0);
    for (float& x : numbers) x = next();
    for (uint16_t& x : halves) x = f32_to_bf16(next());
    copy_to_device(at, half ? static_cast<void*>(halves.data()) : numbers.data(),
                   n * (half ? 2 : 4), stream);
  }

 private:
  std::mt19937 random_;
  std::vector<float> table_;
};

// Compresses random tokens of `sequence`'s dense buffer into its first pages.
void fill_pages(const StoreLayout& layout, const SequenceView& sequence, const DeviceBuffer& table,
                int32_t n_pages, Stream stream) {
  DeviceBuffer bad_row, commits;
  CompressArgs args;
  args.layout = layout;
  args.n_layers = 1;
  args.tail_dtype = kTail;
  args.n_steps = 1;
  args.max_new_blocks = 1;
  args.bad_row = bad_row.ensure<int32_t>(1);
  for (int32_t i = 0; i < n_pages; i++) {
    CommitView step;
    step.sequence = sequence;
    step.sequence.n_sinks = i * 3;  // another 64 of the random tokens each time
    step.new_pages = static_cast<uint8_t* const*>(table.data()) + i;
    step.dense_tokens = kCapacity;
    step.n_new_blocks = 1;
    step.end_pos = sequence.pos0;
    args.steps = commits.ensure<CommitView>(1);
    copy_to_device(commits.data(), &step, sizeof step, stream);
    compress(args, stream);
    synchronize(stream);
  }
}

// NMSE of the checked rows against the plain kernel. args: filled, its partials and out for use.
double error_of(const AttentionArgs& args, const SequenceView& view, Stream stream) {
  const int64_t width = int64_t{args.n_heads} * kHeadDim, n = args.n_rows * width;
  std::vector<SequenceView> parts;
  const int32_t count = std::min(kCheckedRows, view.n_rows);
  for (const int32_t first : {0, (view.n_rows - count) / 2, view.n_rows - count}) {
    SequenceView part = view;
    part.row0 = first;
    part.pos0 += first;
    part.n_rows = count;
    parts.push_back(part);
  }
  DeviceBuffer views;
  views.ensure<SequenceView>(static_cast<int64_t>(parts.size()));
  copy_to_device(views.data(), parts.data(),
                 static_cast<int64_t>(parts.size() * sizeof(SequenceView)), stream);

  std::vector<float> result[2];
  for (const bool fast : {true, false}) {
    fill_bytes(args.out, 0xff, n * 4, stream);
    if (fast) {
      if (!attend(args, stream)) throw Error("no fast kernel takes this setting");
    } else {
      AttentionArgs plain = args;
      plain.sequences = static_cast<const SequenceView*>(views.data());
      plain.n_sequences = static_cast<int32_t>(parts.size());
      plain.max_row_count = count;
      attention_plain(plain, stream);
      combine_attention(plain, stream);
    }
    for (const SequenceView& part : parts) {
      std::vector<float> rows(part.n_rows * width);
      copy_to_host(rows.data(), args.out + part.row0 * width, part.n_rows * width * 4, stream);
      synchronize(stream);
      result[fast].insert(result[fast].end(), rows.begin(), rows.end());
    }
  }
  double error = 0, power = 0;
  for (size_t i = 0; i < result[0].size(); i++) {
    error += (result[1][i] - result[0][i]) * (result[1][i] - result[0][i]);
    power += result[0][i] * result[0][i];
  }
  return std::isfinite(error / power) ? error / power : 1e30;  // NaN is no JSON
}

// Whether the result was right.
bool run(const Shape& shape, const Setting& setting, double budget, Stream stream) {
  const auto slot = [&](bool is_key, double sparsity) {
    return make_slot_layout(kHeadDim, is_key, sparsity, true, setting.values);
  };
  const StoreLayout layout = make_store_layout(1, shape.n_kv_heads, slot(true, setting.k_sparsity),
                                               slot(false, setting.v_sparsity));
  const int32_t n_blocks = shape.prefix / kBlockTokens;
  NormalNumbers numbers(static_cast<uint32_t>(shape.rows + shape.before + shape.prefix));
  DeviceBuffer dense, fresh, pages, page_table, views, q, out, partials;

  SequenceView s;
  s.n_rows = shape.rows;
  s.n_blocks = n_blocks;
  s.dense_capacity = kCapacity;
  s.dense_tokens = n_blocks > 0 ? kWindow : 0;
  s.fresh_pos0 = n_blocks * kBlockTokens + s.dense_tokens;
  s.pos0 = s.fresh_pos0 + shape.before;
  s.fresh_capacity = shape.before + shape.rows;
  const int64_t plane = int64_t{2} * shape.n_kv_heads * kHeadDim;
  s.dense = dense.ensure<uint8_t>(plane * kCapacity * 2);
  s.fresh = fresh.ensure<uint8_t>(plane * s.fresh_capacity * 2);
  numbers.to_device(s.dense, plane * kCapacity, true, stream);
  numbers.to_device(s.fresh, plane * s.fresh_capacity, true, stream);
  if (n_blocks > 0) {
    pages.ensure<uint8_t>(n_blocks * layout.page_bytes + kSlabSlack);
    std::vector<uint8_t*> addresses(n_blocks);
    for (int32_t i = 0; i < n_blocks; i++) {
      addresses[i] = static_cast<uint8_t*>(pages.data()) + i * layout.page_bytes;
    }
    s.pages = page_table.ensure<const uint8_t*>(n_blocks);
    copy_to_device(page_table.data(), addresses.data(), int64_t{n_blocks} * 8, stream);
    const int32_t distinct = std::min(kDistinctPages, n_blocks);
    fill_pages(layout, s, page_table, distinct, stream);
    for (int32_t i = distinct; i < n_blocks; i++) {
      copy_on_device(addresses[i], addresses[i % distinct], layout.page_bytes, stream);
    }
  }
  views.ensure<SequenceView>(1);
  copy_to_device(views.data(), &s, sizeof s, stream);

  const int64_t width = int64_t{shape.n_heads} * kHeadDim;
  AttentionArgs args;
  args.sequences = static_cast<const SequenceView*>(views.data());
  args.n_sequences = 1;
  args.n_rows = args.max_row_count = shape.rows;
  args.layout = layout;
  args.tail_dtype = kTail;
  args.n_heads = shape.n_heads;
  args.n_kv_heads = shape.n_kv_heads;
  args.head_dim = kHeadDim;
  args.decode = false;
  args.q = q.ensure<float>(shape.rows * width);
  args.out = out.ensure<float>(shape.rows * width);
  args.partials = partials.ensure<float>(int64_t{shape.rows} * shape.n_heads * (kHeadDim + 2));
  numbers.to_device(q.data(), shape.rows * width, false, stream);

  const double nmse = error_of(args, s, stream);
  const bool good = nmse <= 1e-5;
  const Graph graph = record_graph(stream, [&] { attend(args, stream); });
  const double seconds = seconds_of(stream, graph, budget);
  destroy_graph(graph);
  const double first_sees = static_cast<double>(s.fresh_pos0) + shape.before + 1;
  const double pairs = shape.rows * (first_sees + (shape.rows - 1) / 2.0);
  const double flop = 4.0 * kHeadDim * shape.n_heads * pairs;
  std::printf(
      "{\"kernel\": \"prefill_attention\", \"setting\": \"%s\", \"rows\": %d, \"before\": %d, "
      "\"prefix\": %d, \"heads\": %d, \"kv_heads\": %d, \"us\": %.1f, \"gflop\": %.1f, "
      "\"tflop_per_s\": %.1f, \"nmse\": %.3g, \"nmse_ok\": %s}\n",
      n_blocks > 0 ? setting.name : "no prefix", shape.rows, shape.before, n_blocks * kBlockTokens,
      shape.n_heads, shape.n_kv_heads, seconds * 1e6, flop / 1e9, flop / seconds / 1e12, nmse,
      good ? "true" : "false");
  std::fflush(stdout);
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const double budget = argc > 1 ? std::atof(argv[1]) : 0.3;
    std::vector<Shape> shapes;
    for (int i = 2; i < argc; i++) {
      Shape s{};
      s.setting = kAllSettings;
      const int n = std::sscanf(argv[i], "%d,%d,%d,%d,%d,%d", &s.rows, &s.before, &s.prefix,
                                &s.n_heads, &s.n_kv_heads, &s.setting);
      if (n < 5 || s.setting >= static_cast<int32_t>(std::size(kSettings))) {
        std::fprintf(stderr, "expected rows,before,prefix,heads,kv_heads[,setting], got %s\n",
                     argv[i]);
        return 2;
      }
      shapes.push_back(s);
    }
    // Whole prompts, then chunks as the engine runs them: late in a prompt, and over a prefix.
    if (shapes.empty()) {
      shapes = {{4096, 0, 0, 32, 8, 0},
                {32768, 0, 0, 32, 8, 0},
                {512, 15872, 0, 32, 8, 0},
                {2048, 14336, 0, 32, 8, 0},
                {512, 0, 16384, 32, 8, kAllSettings},
                {2048, 0, 16384, 32, 8, kAllSettings}};
    }
    const DeviceProperties device = open_device();
    const Stream stream = make_stream();
    bool all_good = true;
    std::printf("{\"device\": \"%s\", \"sm\": %d, \"multiprocessors\": %d}\n", device.name.c_str(),
                device.compute_capability, device.n_multiprocessors);
    for (const Shape& shape : shapes) {
      for (int32_t i = 0; i < static_cast<int32_t>(std::size(kSettings)); i++) {
        const bool any_setting = shape.setting == kAllSettings;
        if (shape.prefix < kBlockTokens ? i > 0 : !any_setting && i != shape.setting) continue;
        all_good = measured({{"kernel", "prefill_attention"},
                             {"setting", kSettings[i].name},
                             {"rows", shape.rows},
                             {"before", shape.before},
                             {"prefix", shape.prefix},
                             {"heads", shape.n_heads},
                             {"kv_heads", shape.n_kv_heads}},
                            [&] { return run(shape, kSettings[i], budget, stream); }) &&
                   all_good;
      }
    }
    destroy_stream(stream);
    return all_good ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
