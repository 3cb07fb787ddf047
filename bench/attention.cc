// Decode attention over the compressed cache against our own dense attention and the read
// bandwidth, all in one run: one decode step per layer, rotating over layers until the bytes of the
// smallest setting exceed four times the last-level cache. Settings are interleaved, medians are
// reported.
//
//   mustafar_attention_bench [--heads 32] [--kv-heads 8] [--head-dim 128] [--context 16384,65536]
//       [--threads 0] [--repeats 11] [--isa NAME,...] [--llc-mib 32] [--window 32] [--json FILE]
//       [--cache PART_OF_A_NAME]
//
// Prints Markdown: nanoseconds per token and KV head, GB/s read and its fraction of the measured
// bandwidth, the ratio to dense bf16, and the share of compression in a decode step.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "backend/cpu/attention/decode.h"
#include "backend/cpu/compress/commit.h"
#include "backend/cpu/isa.h"
#include "core/thread_pool.h"
#include "format/block_format.h"
#include "format/coded.h"
#include "format/pack.h"
#include "format/prune.h"

namespace mustafar {
namespace {

struct Options {
  int32_t n_heads = 32, n_kv_heads = 8, head_dim = 128, window = 32;
  int threads = 0, repeats = 11;
  std::vector<int64_t> contexts = {16384, 65536};
  std::vector<Isa> isas = {detect_isa()};
  int64_t llc_bytes = int64_t{32} << 20;
  std::string json;
  std::string filter;  // part of the names of settings to measure
};

struct Setting {
  const char* name;
  DType dtype;
  double k_sparsity, v_sparsity;
  double bits = 0;  // coded
};

const Setting kSettings[] = {
    {"bf16 dense", DType::kBF16, 0, 0},
    {"f16 dense", DType::kF16, 0, 0},
    {"int8 dense", DType::kInt8, 0, 0},
    {"int4 dense", DType::kInt4, 0, 0},
    {"bf16 K 16/32 V 8/16", DType::kBF16, .5, .5},
    {"bf16 K 12/32 V 4/16", DType::kBF16, .625, .75},
    {"f16 K 12/32 V 4/16", DType::kF16, .625, .75},
    {"int8 K 12/32 V 4/16", DType::kInt8, .625, .75},
    {"int4 K 16/32 V 8/16", DType::kInt4, .5, .5},
    {"coded 4 bits", DType::kCoded, 0, 0, 4},
    {"coded 3 bits", DType::kCoded, 0, 0, 3},
    {"coded 2 bits", DType::kCoded, 0, 0, 2},
};

SlotLayout slot_of(const Options& options, const Setting& setting, bool is_key) {
  if (setting.dtype == DType::kCoded) return make_coded_layout(options.head_dim, setting.bits);
  return make_slot_layout(options.head_dim, is_key,
                          is_key ? setting.k_sparsity : setting.v_sparsity, true, setting.dtype);
}

DType tail_of(DType dtype) { return dtype == DType::kF16 ? DType::kF16 : DType::kBF16; }

// A cache of one sequence for enough layers to defeat the last-level cache.
struct Cache {
  StoreLayout layout;
  DType tail;
  HostBuffer pages_memory, dense;
  std::vector<const uint8_t*> pages;
  SequenceStep step;
  std::vector<uint8_t> widths[2];  // V, K
  std::vector<float> sigmas;
  CodeTables codes;

  Cache(const Options& options, const Setting& setting, int64_t context, int32_t n_layers) {
    layout = make_store_layout(n_layers, options.n_kv_heads, slot_of(options, setting, true),
                               slot_of(options, setting, false));
    if (setting.dtype == DType::kCoded) make_codes(options);
    tail = tail_of(setting.dtype);
    const int64_t n_blocks = compressed_tokens(context, 0, options.window) / kBlockTokens;
    pages_memory = HostBuffer(n_blocks * layout.page_bytes + kSlabSlack);
    // One random slot of each kind, copied: time does not depend on the values.
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<uint8_t> samples[2];
    for (const bool is_key : {true, false}) {
      const SlotLayout& s = is_key ? layout.k : layout.v;
      std::vector<float> rows(size_t{kBlockTokens} * s.head_dim);
      for (float& x : rows) x = normal(random);
      std::vector<uint32_t> masks(size_t{kBlockTokens} * s.mask_words);
      for (int32_t t = 0; t < kBlockTokens && !s.dense; t++) {
        select_row(s, rows.data() + t * s.head_dim, nullptr, masks.data() + t * s.mask_words);
      }
      samples[is_key].resize(s.slot_bytes);
      if (setting.dtype == DType::kCoded) {
        pack_coded_block(s, code_table(codes, layout, 0, 0, is_key), rows.data(),
                         samples[is_key].data());
      } else {
        pack_block(s, rows.data(), masks.data(), samples[is_key].data());
      }
    }
    for (int64_t b = 0; b < n_blocks; b++) {
      uint8_t* page = pages_memory.as<uint8_t>() + b * layout.page_bytes;
      pages.push_back(page);
      for (int32_t i = 0; i < n_layers * options.n_kv_heads; i++) {
        const int32_t layer = i / options.n_kv_heads, head = i % options.n_kv_heads;
        std::memcpy(page + k_slot_offset(layout, layer, head), samples[1].data(),
                    samples[1].size());
        std::memcpy(page + v_slot_offset(layout, layer, head), samples[0].data(),
                    samples[0].size());
      }
    }
    step.layout = &layout;
    step.pages = pages.data();
    step.n_blocks = static_cast<int32_t>(n_blocks);
    step.dense_tokens = static_cast<int32_t>(context - n_blocks * kBlockTokens) - 1;
    step.dense_capacity = options.window + kBlockTokens;
    const int64_t values =
        int64_t{n_layers} * 2 * options.n_kv_heads * step.dense_capacity * options.head_dim;
    dense = HostBuffer(dtype_bytes(tail, values));
    for (int64_t i = 0; i < values; i++) store_float(dense.data(), tail, i, normal(random));
    step.dense = dense.as<uint8_t>();
    step.n_rows = 1;
    if (setting.dtype == DType::kCoded) step.codes = codes;
  }
  Cache(Cache&&) = delete;

  // Energies that fall a thousandfold over the dims, the same in every head.
  void make_codes(const Options& options) {
    const int32_t n = options.head_dim;
    for (int32_t d = 0; d < n; d++) {
      sigmas.push_back(std::exp(-3.45f * static_cast<float>(d) / static_cast<float>(n)));
    }
    const int64_t heads = int64_t{layout.n_layers} * options.n_kv_heads;
    for (const bool is_key : {true, false}) {
      std::vector<uint8_t>& of_kind = widths[is_key];
      of_kind.resize(n);
      deal_widths(sigmas.data(), n, (is_key ? layout.k : layout.v).row_bytes, of_kind.data());
      for (int64_t i = 1; i < heads; i++)
        for (int32_t d = 0; d < n; d++) of_kind.push_back(of_kind[d]);
    }
    std::vector<float> all;
    for (int64_t i = 0; i < heads; i++) all.insert(all.end(), sigmas.begin(), sigmas.end());
    sigmas = std::move(all);
    codes = {widths[1].data(), widths[0].data(), sigmas.data(), sigmas.data()};
  }

  // Read by one layer's decode step.
  double bytes(const Options& options) const {
    return static_cast<double>(step.n_blocks) * options.n_kv_heads *
               (layout.k.slot_bytes + layout.v.slot_bytes) +
           2.0 * options.n_kv_heads * (step.dense_tokens + 1) * dtype_bytes(tail, options.head_dim);
  }
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
  return x[x.size() / 2];
}

// Seconds that all threads together take to read a buffer from end to end.
double read_all(ThreadPool& pool, const HostBuffer& buffer) {
  constexpr int64_t kPiece = 1 << 20;
  const int64_t pieces = static_cast<int64_t>(buffer.bytes()) / kPiece;
  std::vector<uint64_t> sums(pool.size() * 8);
  const double start = now();
  pool.parallel_for(pieces, [&](int64_t i, int worker) {
    const uint64_t* p = buffer.as<uint64_t>() + i * kPiece / 8;
    uint64_t s[8] = {};
    for (int64_t k = 0; k < kPiece / 8; k += 8) {
      __builtin_prefetch(p + k + 512);
      for (int j = 0; j < 8; j++) s[j] ^= p[k + j];
    }
    for (int j = 0; j < 8; j++) sums[worker * 8] ^= s[j];
  });
  const double seconds = now() - start;
  static volatile uint64_t sink;
  sink = sums[0];
  return seconds + static_cast<double>(sink & 0);
}

struct Row {
  Isa isa;
  const Setting* setting;
  std::unique_ptr<Cache> cache;
  std::vector<double> seconds;  // a decode step of one layer
  double median_seconds = 0;
};

// Seconds to compress one block of every KV head, K and V.
double commit_seconds(ThreadPool& pool, const Options& options, Row& row) {
  Cache& cache = *row.cache;
  std::vector<uint8_t*> pages = {const_cast<uint8_t*>(cache.pages[0])};
  HostBuffer out(cache.dense.bytes());
  CommitStep step;
  step.sequence = cache.step;
  step.layout = cache.step.layout;
  step.dense_tokens = options.window + kBlockTokens;
  step.new_pages = pages.data();
  step.n_new_blocks = 1;
  step.end_pos = step.dense_tokens;
  step.dense_out = out.as<uint8_t>();
  std::vector<double> seconds;
  for (int i = 0; i < 21; i++) {
    const double start = now();
    commit_blocks(pool, row.isa, cache.tail, {&step, 1}, 0, 1);
    seconds.push_back(now() - start);
  }
  return median(seconds);
}

void run_context(const Options& options, int64_t context, std::ostream* json) {
  ThreadPool pool(options.threads);
  std::vector<Row> rows;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> q(size_t(options.n_heads) * options.head_dim), out(q.size());
  for (float& x : q) x = normal(random);

  // Settings one after another hold the memory, so each pass measures all ISAs of one setting next
  // to dense bf16 and the bandwidth.
  HostBuffer stream(4 * options.llc_bytes);
  std::memset(stream.data(), 1, stream.bytes());
  const auto layers_for = [&](const Setting& s) {
    const SlotLayout k = slot_of(options, s, true), v = slot_of(options, s, false);
    const double per_layer = static_cast<double>(context) / kBlockTokens * options.n_kv_heads *
                             (k.slot_bytes + v.slot_bytes);
    return static_cast<int32_t>(4.0 * options.llc_bytes / per_layer) + 1;
  };
  std::printf("\n## %lld tokens, %d/%d heads x %d, %d threads\n\n", static_cast<long long>(context),
              options.n_heads, options.n_kv_heads, options.head_dim, pool.size());
  std::printf(
      "| ISA | cache | bytes/token/head | ns/token/head | GB/s | of read bandwidth | vs dense "
      "bf16 | compression |\n|---|---|---|---|---|---|---|---|\n");
  for (const Setting& setting : kSettings) {
    const Setting& baseline = kSettings[0];
    if (std::string(setting.name).find(options.filter) == std::string::npos) continue;
    for (const Isa isa : options.isas) {
      Row pair[2];
      for (int i = 0; i < 2; i++) {
        pair[i].isa = isa;
        pair[i].setting = i == 0 ? &baseline : &setting;
        pair[i].cache = std::make_unique<Cache>(options, *pair[i].setting, context,
                                                layers_for(*pair[i].setting));
      }
      std::vector<double> reads;
      HostBuffer scratch;
      for (int repeat = 0; repeat <= options.repeats; repeat++) {
        const double read = read_all(pool, stream);
        for (Row& row : pair) {
          DecodeAttentionArgs args;
          args.n_heads = options.n_heads;
          args.n_kv_heads = options.n_kv_heads;
          args.head_dim = options.head_dim;
          args.tail_dtype = row.cache->tail;
          args.sequences = {&row.cache->step, 1};
          args.q = q.data();
          args.out = out.data();
          const double start = now();
          for (args.layer = 0; args.layer < row.cache->layout.n_layers; args.layer++) {
            decode_attention(pool, isa, args, scratch);
          }
          if (repeat > 0) {
            row.seconds.push_back((now() - start) / row.cache->layout.n_layers);
          }
        }
        if (repeat > 0) reads.push_back(read);
      }
      const double bandwidth = static_cast<double>(stream.bytes()) / median(reads);
      for (Row& row : pair) row.median_seconds = median(row.seconds);
      const Row& row = pair[1];
      const double bytes = row.cache->bytes(options);
      const double tokens = static_cast<double>(context) * options.n_kv_heads;
      const double ratio = pair[0].median_seconds / row.median_seconds;
      // A block is compressed every 64 tokens.
      const double commit = commit_seconds(pool, options, pair[1]) / kBlockTokens;
      std::printf("| %s | %s | %.1f | %.2f | %.1f | %.0f %% | %.2fx | %.2f %% |\n", isa_name(isa),
                  setting.name, bytes / tokens, row.median_seconds / tokens * 1e9,
                  bytes / row.median_seconds * 1e-9, 100 * bytes / row.median_seconds / bandwidth,
                  ratio, 100 * commit / row.median_seconds);
      std::fflush(stdout);
      if (json != nullptr) {
        *json << (json->tellp() > 2 ? ",\n" : "") << "  {\"isa\": \"" << isa_name(isa)
              << "\", \"cache\": \"" << setting.name << "\", \"context\": " << context
              << ", \"n_heads\": " << options.n_heads << ", \"n_kv_heads\": " << options.n_kv_heads
              << ", \"head_dim\": " << options.head_dim << ", \"threads\": " << pool.size()
              << ", \"layers\": " << row.cache->layout.n_layers << ", \"bytes\": " << bytes
              << ", \"seconds\": " << row.median_seconds
              << ", \"dense_bf16_seconds\": " << pair[0].median_seconds
              << ", \"read_bytes_per_second\": " << bandwidth << ", \"ratio\": " << ratio
              << ", \"compression_share\": " << commit / row.median_seconds << "}";
      }
    }
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    std::stringstream list(value);
    std::string item;
    if (name == "--heads")
      options.n_heads = std::stoi(value);
    else if (name == "--kv-heads")
      options.n_kv_heads = std::stoi(value);
    else if (name == "--head-dim")
      options.head_dim = std::stoi(value);
    else if (name == "--window")
      options.window = std::stoi(value);
    else if (name == "--threads")
      options.threads = std::stoi(value);
    else if (name == "--repeats")
      options.repeats = std::stoi(value);
    else if (name == "--llc-mib")
      options.llc_bytes = std::stoll(value) << 20;
    else if (name == "--cache")
      options.filter = value;
    else if (name == "--json")
      options.json = value;
    else if (name == "--context") {
      options.contexts.clear();
      while (std::getline(list, item, ',')) options.contexts.push_back(std::stoll(item));
    } else if (name == "--isa") {
      options.isas.clear();
      while (std::getline(list, item, ',')) {
        for (const Isa isa : available_isas()) {
          if (item == isa_name(isa) || item == "all") options.isas.push_back(isa);
        }
      }
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  return options;
}

}  // namespace
}  // namespace mustafar

int main(int argc, char** argv) {
  try {
    const mustafar::Options options = mustafar::parse(argc, argv);
    std::ostringstream json;
    json << "[\n";
    for (const int64_t context : options.contexts) {
      mustafar::run_context(options, context, &json);
    }
    json << "\n]\n";
    if (!options.json.empty()) std::ofstream(options.json) << json.str();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
