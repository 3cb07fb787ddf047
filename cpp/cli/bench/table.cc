#include "cli/bench/table.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "cli/report.h"
#include "cli/terminal.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

double deviation(const std::vector<double>& values) {  // of a sample
  if (values.size() < 2) return 0;
  const double centre = mean(values);
  double sum = 0;
  for (const double value : values) sum += (value - centre) * (value - centre);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

std::vector<double> rates(const BenchRow& row) {
  std::vector<double> rates;
  for (const double ns : row.samples_ns) {
    rates.push_back(static_cast<double>(row.n_batch * (row.n_prompt + row.n_gen)) / (ns * 1e-9));
  }
  return rates;
}

// Commas and quotes need quotes around them.
std::string csv_field(const Json& value) {
  const std::string text = value.is_string() ? value.get<std::string>() : dump(value);
  std::string out = "\"";
  for (const char c : text) {
    out += c;
    if (c == '"') out += '"';
  }
  return out + "\"";
}

}  // namespace

std::string BenchRow::test() const {
  std::string name;
  if (n_prompt > 0) name = "pp" + std::to_string(n_prompt);
  if (n_gen > 0) name += (name.empty() ? "tg" : "+tg") + std::to_string(n_gen);
  if (n_batch > 1) name = std::to_string(n_batch) + " x " + name;
  return n_depth > 0 ? name + " @ d" + std::to_string(n_depth) : name;
}

double BenchRow::avg_ns() const { return mean(samples_ns); }
double BenchRow::stddev_ns() const { return deviation(samples_ns); }
double BenchRow::avg_ts() const { return mean(rates(*this)); }
double BenchRow::stddev_ts() const { return deviation(rates(*this)); }

double BenchRow::median_ns() const {
  std::vector<double> sorted = samples_ns;
  std::sort(sorted.begin(), sorted.end());
  const size_t n = sorted.size();
  return n == 0 ? 0 : (sorted[(n - 1) / 2] + sorted[n / 2]) / 2;
}

double BenchRow::bytes_per_second() const {
  const double ns = median_ns();
  return ns > 0 ? bytes_per_pass * passes / (ns * 1e-9) : 0;
}

Json BenchRow::json() const {
  return {{"model", model},
          {"model_size", model_size},
          {"model_n_params", model_n_params},
          {"backend", backend},
          {"device", device},
          {"n_threads", n_threads},
          {"kv", kv},
          {"kv_config", kv_config},
          {"kv_bytes", kv_bytes},
          {"kv_dense_bytes", kv_dense_bytes},
          {"test", test()},
          {"n_prompt", n_prompt},
          {"n_gen", n_gen},
          {"n_depth", n_depth},
          {"n_batch", n_batch},
          {"avg_ns", avg_ns()},
          {"median_ns", median_ns()},
          {"stddev_ns", stddev_ns()},
          {"avg_ts", avg_ts()},
          {"stddev_ts", stddev_ts()},
          {"samples_ns", samples_ns},
          {"bytes_per_second", bytes_per_second()},
          {"read_bandwidth", read_bandwidth},
          {"bandwidth_fraction", read_bandwidth > 0 ? bytes_per_second() / read_bandwidth : 0},
          {"working_set_bytes", working_set},
          {"replicas", replicas}};
}

BenchTable::BenchTable(const std::string& format) : format_(format) {
  if (format != "md" && format != "csv" && format != "json" && format != "jsonl") {
    throw std::invalid_argument("-o must be md, csv, json or jsonl, not \"" + format + "\"");
  }
}

void BenchTable::add(const BenchRow& row) {
  if (format_ == "md") {
    add_markdown(row);
  } else if (format_ == "csv") {
    add_csv(row.json());
  } else {
    add_json(row.json());
  }
  any_ = true;
  std::fflush(stdout);
}

void BenchTable::add_markdown(const BenchRow& row) {
  const auto print = [](const std::vector<std::string>& cells) {
    constexpr int kWidths[] = {16, 10, 9, 7, 7, 16, 20, 19, 7, 6};
    for (size_t i = 0; i < cells.size(); i++) {
      // The plus-minus sign takes two bytes and one column.
      const int extra = cells[i].find("\xc2\xb1") != std::string::npos ? 1 : 0;
      std::printf("| %*s ", kWidths[i] + extra, cells[i].c_str());
    }
    std::printf("|\n");
  };
  if (!any_) {
    print({"model", "size", "params", "backend", "threads", "kv", "test", "t/s", "GB/s", "of bw"});
    std::printf(
        "|%s|\n",
        "-----------------:|-----------:|----------:|--------:|--------:|-----------------:|"
        "---------------------:|--------------------:|--------:|-------");
  }
  const double fraction = row.read_bandwidth > 0 ? row.bytes_per_second() / row.read_bandwidth : 0;
  print({row.model, format_bytes(static_cast<double>(row.model_size)),
         format_count(static_cast<double>(row.model_n_params)), row.backend,
         std::to_string(row.n_threads), row.kv, row.test(),
         format_number(row.avg_ts(), 2) + " \xc2\xb1 " + format_number(row.stddev_ts(), 2),
         format_number(row.bytes_per_second() / 1e9, 1),
         fraction > 0 ? format_number(100 * fraction, 0) + "%" : "-"});
}

void BenchTable::add_csv(const Json& row) {
  std::string names;
  std::string values;
  for (const auto& [name, value] : row.items()) {
    names += (names.empty() ? "" : ",") + name;
    values += (values.empty() ? "" : ",") + csv_field(value);
  }
  if (!any_) std::printf("%s\n", names.c_str());
  std::printf("%s\n", values.c_str());
}

void BenchTable::add_json(const Json& row) {
  if (format_ == "jsonl") {
    std::printf("%s\n", dump(row).c_str());
  } else {
    std::printf("%s%s", any_ ? ",\n" : "[\n", dump(row, 2).c_str());
  }
}

void BenchTable::add_extra(const Json& row) {
  if (format_ == "md") {
    std::string names;
    std::string rule;
    std::string values;
    for (const auto& [name, value] : row.items()) {
      names += "| " + name + " ";
      rule += "|---";
      values += "| " + (value.is_string() ? value.get<std::string>() : dump(value)) + " ";
    }
    if (!any_extra_) std::printf("\n%s|\n%s|\n", names.c_str(), rule.c_str());
    std::printf("%s|\n", values.c_str());
  } else if (format_ == "csv") {
    if (!any_extra_) {
      std::printf("\n");
      any_ = false;  // a table of its own, with a header
    }
    add_csv(row);
  } else {
    add_json(row);
  }
  any_ = true;
  any_extra_ = true;
}

void BenchTable::finish() {
  if (format_ == "json") std::printf("%s\n", any_ ? "\n]" : "[]");
}

}  // namespace mustafar::cli
