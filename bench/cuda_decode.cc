// Decode attention on the GPU: time per layer and share of the copy bandwidth, for dense and
// compressed caches, each checked against the plain kernel first. Prints JSON lines; one that could
// not be measured has an "error". The exit status is 1 if there was one, or a wrong result.
//
//   mustafar_cuda_bench [-s setting] [-r splits] [seconds per measurement] [shape ...]
//
// shape: batch,context,heads,kv_heads[,layers]; setting: part of a name, such as "int8"; splits: of
// a block, 1 to 8 instead of what the model chooses. A step is a graph of one attend per
// layer over layers whose pages exceed the L2 many times, so that every layer is read cold. A
// context that does not fit the device is an error of its row alone.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "bench/cuda_timing.h"
#include "cuda/attention.h"
#include "cuda/buffer.h"
#include "cuda/compress.h"
#include "cuda/device.h"
#include "format/block_format.h"
#include "format/coded.h"
#include "mustafar/error.h"

namespace {

using namespace mustafar;
using namespace mustafar::cuda;

constexpr int32_t kHeadDim = 128;
constexpr int32_t kWindow = 32;
constexpr int32_t kCapacity = kWindow + kBlockTokens;
constexpr int64_t kColdBytes = int64_t{1} << 30;  // of pages read per step, at least
constexpr int32_t kDistinctPages = 8;             // the rest of a sequence repeats them

struct Shape {
  int32_t batch, context, n_heads, n_kv_heads;
  int32_t n_layers;  // 0: as many as are read cold
};

struct Setting {
  const char* name;
  double k_sparsity, v_sparsity;
  DType values;
  double bits = 0;  // coded
};

constexpr Setting kSettings[] = {
    {"dense f16", 0, 0, DType::kF16},           {"dense int8", 0, 0, DType::kInt8},
    {"dense int4", 0, 0, DType::kInt4},         {"f16 56 %", 0.5, 0.5, DType::kF16},
    {"f16 37.5 %", 0.625, 0.75, DType::kF16},   {"int8 32.8 %", 0.5, 0.5, DType::kInt8},
    {"int8 22.7 %", 0.625, 0.75, DType::kInt8}, {"int4 19.5 %", 0.5, 0.5, DType::kInt4},
    {"coded 4", 0, 0, DType::kCoded, 4},        {"coded 3", 0, 0, DType::kCoded, 3},
};

// Tables of coded rows on the device: the energies of a layer and KV head fall eightfold over the
// dims, so that widths differ.
class Codes {
 public:
  Codes(const StoreLayout& layout, Stream stream) {
    const int32_t head_dim = layout.k.head_dim;
    const size_t n = static_cast<size_t>(layout.n_layers) * layout.n_kv_heads * head_dim;
    std::vector<float> sigmas(n);
    std::vector<uint8_t> widths(n);
    for (size_t i = 0; i < n; i++) {
      sigmas[i] =
          std::exp2(-3.0f * static_cast<float>(i % head_dim) / static_cast<float>(head_dim));
    }
    for (size_t at = 0; at < n; at += head_dim) {
      deal_widths(&sigmas[at], head_dim, layout.k.row_bytes, &widths[at]);
    }
    sigmas_.ensure<float>(n);
    widths_.ensure<uint8_t>(n);
    copy_to_device(sigmas_.data(), sigmas.data(), n * 4, stream);
    copy_to_device(widths_.data(), widths.data(), n, stream);
    synchronize(stream);
  }

  // The same for keys and values.
  CodeTables tables() const {
    const auto* widths = static_cast<const uint8_t*>(widths_.data());
    const auto* sigmas = static_cast<const float*>(sigmas_.data());
    return {widths, widths, sigmas, sigmas};
  }

 private:
  DeviceBuffer sigmas_, widths_;
};

// Whether the result was right.
bool run(const Shape& shape, const Setting& setting, int32_t splits_per_block, double bandwidth,
         double budget, Stream stream) {
  const bool coded = setting.values == DType::kCoded;
  const auto slot = [&](bool is_key, double sparsity) {
    if (coded) return make_coded_layout(kHeadDim, setting.bits);
    return make_slot_layout(kHeadDim, is_key, sparsity, true, setting.values);
  };
  const SlotLayout k = slot(true, setting.k_sparsity), v = slot(false, setting.v_sparsity);
  const int32_t n_blocks = (shape.context - kWindow) / kBlockTokens;
  const int32_t dense_tokens = shape.context - n_blocks * kBlockTokens - 1;
  const int64_t layer_bytes =
      int64_t{shape.n_kv_heads} * (k.slot_bytes + v.slot_bytes) * n_blocks * shape.batch;
  const int32_t n_layers =
      shape.n_layers > 0
          ? shape.n_layers
          : static_cast<int32_t>(std::clamp<int64_t>(kColdBytes / layer_bytes + 1, 2, 32));
  const StoreLayout layout = make_store_layout(n_layers, shape.n_kv_heads, k, v);

  // Random tokens, compressed into a few pages, copied to all.
  const int64_t plane = int64_t{2} * shape.n_kv_heads * kCapacity * kHeadDim;
  std::vector<uint16_t> random_values(plane * n_layers);
  std::mt19937 random(shape.context);
  std::normal_distribution<float> normal;
  std::vector<float> table(1 << 16);
  for (float& x : table) x = normal(random);
  for (uint16_t& x : random_values) x = f32_to_f16(table[random() & 0xffff]);
  const int64_t dense_bytes = static_cast<int64_t>(random_values.size()) * 2;
  DeviceBuffer dense, pages, page_table, bad_row, views, commits, q, out, check, partials;
  dense.ensure<uint8_t>(dense_bytes * shape.batch);
  for (int32_t i = 0; i < shape.batch; i++) {
    copy_to_device(static_cast<uint8_t*>(dense.data()) + i * dense_bytes, random_values.data(),
                   dense_bytes, stream);
  }
  const int64_t n_pages = int64_t{n_blocks} * shape.batch;
  pages.ensure<uint8_t>(n_pages * layout.page_bytes + kSlabSlack);
  std::vector<uint8_t*> addresses(n_pages);
  for (int64_t i = 0; i < n_pages; i++) {
    addresses[i] = static_cast<uint8_t*>(pages.data()) + i * layout.page_bytes;
  }
  page_table.ensure<uint8_t*>(n_pages);
  copy_to_device(page_table.data(), addresses.data(), n_pages * 8, stream);

  const int64_t q_values = int64_t{shape.batch} * shape.n_heads * kHeadDim;
  std::optional<Codes> codes;
  if (coded) codes.emplace(layout, stream);
  std::vector<SequenceView> sequences(shape.batch);
  for (int32_t i = 0; i < shape.batch; i++) {
    SequenceView& s = sequences[i];
    s.row0 = i;
    s.n_rows = 1;
    s.pos0 = shape.context - 1;
    s.pages = static_cast<const uint8_t* const*>(page_table.data()) + int64_t{i} * n_blocks;
    s.n_blocks = n_blocks;
    s.dense = static_cast<uint8_t*>(dense.data()) + i * dense_bytes;
    s.dense_capacity = kCapacity;
    s.dense_tokens = dense_tokens;
    if (codes) s.codes = codes->tables();
  }
  views.ensure<SequenceView>(shape.batch);
  copy_to_device(views.data(), sequences.data(), shape.batch * sizeof(SequenceView), stream);

  const int32_t distinct = std::min<int64_t>(kDistinctPages, n_pages);
  CompressArgs compress_args;
  compress_args.layout = layout;
  compress_args.n_layers = n_layers;
  compress_args.tail_dtype = DType::kF16;
  compress_args.n_steps = 1;
  compress_args.max_new_blocks = 1;
  compress_args.bad_row = bad_row.ensure<int32_t>(1);
  for (int32_t i = 0; i < distinct; i++) {
    CommitView step;
    step.sequence = sequences[0];
    step.sequence.n_sinks = i * 3;  // another 64 of the random tokens each time
    step.new_pages = static_cast<uint8_t* const*>(page_table.data()) + i;
    step.dense_tokens = kCapacity;
    step.n_new_blocks = 1;
    step.end_pos = shape.context;
    compress_args.steps = commits.ensure<CommitView>(1);
    copy_to_device(commits.data(), &step, sizeof step, stream);
    compress(compress_args, stream);
    synchronize(stream);
  }
  for (int64_t i = distinct; i < n_pages; i++) {
    copy_on_device(addresses[i], addresses[i % distinct], layout.page_bytes, stream);
  }

  std::vector<float> queries(q_values);
  for (float& x : queries) x = table[random() & 0xffff];
  AttentionArgs args;
  args.sequences = static_cast<const SequenceView*>(views.data());
  args.n_sequences = args.n_rows = shape.batch;
  const SeenTokens seen = seen_tokens(sequences[0], 0);
  args.max_splits = seen.n_splits();
  args.load = {shape.batch * args.max_splits,
               (seen.n_tiles() + args.max_splits - 1) / args.max_splits};
  args.splits_per_block = splits_per_block;
  args.layout = layout;
  args.tail_dtype = DType::kF16;
  args.n_heads = shape.n_heads;
  args.n_kv_heads = shape.n_kv_heads;
  args.head_dim = kHeadDim;
  args.q = q.ensure<float>(q_values);
  args.partials = partials.ensure<float>(int64_t{shape.batch} * shape.n_heads * args.max_splits *
                                         (kHeadDim + 2));
  copy_to_device(q.data(), queries.data(), q_values * 4, stream);

  // Against the plain kernel, outputs poisoned.
  std::vector<float> fast(q_values), plain(q_values);
  for (const bool use_fast : {true, false}) {
    args.out = (use_fast ? out : check).ensure<float>(q_values);
    fill_bytes(args.out, 0xff, q_values * 4, stream);
    if (use_fast) {
      if (!decode_attention_fast(args, stream)) throw Error("no fast kernel takes this setting");
    } else {
      attention_plain(args, stream);
    }
    combine_attention(args, stream);
    copy_to_host((use_fast ? fast : plain).data(), args.out, q_values * 4, stream);
    synchronize(stream);
  }
  double error = 0, power = 0;
  for (int64_t i = 0; i < q_values; i++) {
    error += (fast[i] - plain[i]) * (fast[i] - plain[i]);
    power += plain[i] * plain[i];
  }
  const double nmse = std::isfinite(error / power) ? error / power : 1e30;  // NaN is no JSON
  const double tolerance = setting.values == DType::kF16 ? 1e-6 : 1e-5;

  args.out = static_cast<float*>(out.data());
  const Graph graph = record_graph(stream, [&] {
    for (args.layer = 0; args.layer < n_layers; args.layer++) {
      decode_attention_fast(args, stream);
      combine_attention(args, stream);
    }
  });
  const double seconds = seconds_of(stream, graph, budget) / n_layers;
  destroy_graph(graph);
  const double bytes = static_cast<double>(layer_bytes) + static_cast<double>(shape.batch) * 2 *
                                                              shape.n_kv_heads *
                                                              (dense_tokens + 1) * kHeadDim * 2;
  std::printf(
      "{\"kernel\": \"decode_attention\", \"setting\": \"%s\", \"batch\": %d, \"context\": %d, "
      "\"heads\": %d, \"kv_heads\": %d, \"layers\": %d, \"splits_per_block\": %d, "
      "\"us_per_layer\": %.3f, \"bytes\": %.0f, "
      "\"bandwidth\": %.4g, \"of_copy\": %.3f, \"nmse\": %.3g, \"nmse_ok\": %s}\n",
      setting.name, shape.batch, shape.context, shape.n_heads, shape.n_kv_heads, n_layers,
      splits_per_block, seconds * 1e6, bytes, bytes / seconds, bytes / seconds / bandwidth, nmse,
      nmse <= tolerance ? "true" : "false");
  std::fflush(stdout);
  return nmse <= tolerance;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    double budget = 0.3;
    std::string only;
    int32_t splits_per_block = 0;
    std::vector<Shape> shapes;
    for (int i = 1; i < argc; i++) {
      const std::string argument = argv[i];
      Shape s{};
      if (argument == "-s" && i + 1 < argc) {
        only = argv[++i];
      } else if (argument == "-r" && i + 1 < argc && std::atoi(argv[i + 1]) >= 1 &&
                 std::atoi(argv[i + 1]) <= 8) {
        splits_per_block = std::atoi(argv[++i]);
      } else if (argument.find(',') == std::string::npos && std::atof(argv[i]) > 0) {
        budget = std::atof(argv[i]);
      } else if (std::sscanf(argv[i], "%d,%d,%d,%d,%d", &s.batch, &s.context, &s.n_heads,
                             &s.n_kv_heads, &s.n_layers) >= 4) {
        shapes.push_back(s);
      } else {
        std::fprintf(
            stderr,
            "usage: %s [-s setting] [-r 1..8] [seconds] [batch,context,heads,kv_heads[,layers] "
            "...], not %s\n",
            argv[0], argv[i]);
        return 2;
      }
    }
    // The shapes that the documents quote come first.
    if (shapes.empty()) {
      shapes = {{8, 32768, 32, 8, 0},  {1, 32768, 32, 8, 0},  {1, 131072, 32, 8, 0},
                {8, 4096, 32, 8, 0},   {32, 4096, 32, 8, 0},  {8, 32768, 32, 32, 0},
                {1, 32768, 32, 32, 0}, {32, 32768, 32, 8, 0}, {8, 32768, 64, 8, 0}};
    }
    const DeviceProperties device = open_device();
    const Stream stream = make_stream();
    const double bandwidth = copy_bandwidth(stream, budget);
    bool all_good = true;
    std::printf("{\"device\": \"%s\", \"sm\": %d, \"copy_bandwidth\": %.4g}\n", device.name.c_str(),
                device.compute_capability, bandwidth);
    for (const Shape& shape : shapes) {
      for (const Setting& setting : kSettings) {
        if (std::string(setting.name).find(only) == std::string::npos) continue;
        all_good =
            measured(
                {{"kernel", "decode_attention"},
                 {"setting", setting.name},
                 {"batch", shape.batch},
                 {"context", shape.context},
                 {"heads", shape.n_heads},
                 {"kv_heads", shape.n_kv_heads}},
                [&] { return run(shape, setting, splits_per_block, bandwidth, budget, stream); }) &&
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
