#include "io/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "io/json_file.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

struct FormatType {
  const char* name;
  uint64_t bits;
};

constexpr FormatType kFormatTypes[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};

// Walks the header and publishes how far it has come, for messages.
struct CountingIterator {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  const char* at = nullptr;
  const char** furthest = nullptr;

  reference operator*() const { return *at; }
  CountingIterator& operator++() {
    *furthest = ++at;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator old = *this;
    ++*this;
    return old;
  }
  bool operator==(const CountingIterator& other) const { return at == other.at; }
  bool operator!=(const CountingIterator& other) const { return at != other.at; }
};

// Tensor names come from the file: shortened, and without bytes that would upset a terminal.
std::string quote(std::string_view name) {
  constexpr size_t kLongest = 120;
  std::string text = "\"";
  for (char c : name.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    text += byte < 0x20 || byte >= 0x7f ? '?' : c;
  }
  return text + (name.size() > kLongest ? "...\"" : "\"");
}

// Receives the header's JSON piece by piece, so that nothing but the entries is kept in memory and
// nesting costs no stack. Reports the first fault by throwing.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderReader(const std::filesystem::path& path, const char* begin)
      : path_(path), begin_(begin), furthest_(begin) {}

  const char** furthest() { return &furthest_; }
  std::vector<SafetensorsEntry> take_entries() { return std::move(entries_); }

  [[noreturn]] void fail(const std::string& what) const {
    std::string where =
        path_.string() + ": safetensors header, byte " + std::to_string(furthest_ - begin_) + ": ";
    if (in_tensor_) where += "tensor " + quote(entry_.name) + ": ";
    throw ModelError(where + what);
  }

  bool null() override {
    // "__metadata__": null means none.
    if (at_metadata_value()) {
      expecting_metadata_ = false;
      return true;
    }
    return scalar("null");
  }
  bool boolean(bool value) override { return scalar(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return scalar(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return scalar(text); }
  bool binary(binary_t&) override { return scalar("binary"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (depth_ == 3 && in_tensor_ && field_ == Field::kShape) {
      if (entry_.shape.size() == kSafetensorsMaxRank) {
        fail("\"shape\": expected at most " + std::to_string(kSafetensorsMaxRank) + " dimensions");
      }
      entry_.shape.push_back(value);
      return true;
    }
    if (depth_ == 3 && in_tensor_ && field_ == Field::kOffsets) {
      if (n_offsets_ == 2) fail("\"data_offsets\": expected 2 numbers, found more");
      (n_offsets_ == 0 ? entry_.begin : entry_.end) = value;
      n_offsets_++;
      return true;
    }
    return scalar(std::to_string(value));
  }

  bool string(string_t& value) override {
    if (depth_ == 2 && in_tensor_ && field_ == Field::kDtype) {
      for (const FormatType& type : kFormatTypes) {
        if (value == type.name) {
          entry_.dtype = type.name;
          bits_ = type.bits;
          return true;
        }
      }
      fail("\"dtype\": " + quote(value) + " is not a safetensors dtype");
    }
    if (in_metadata_ && depth_ == 2) return true;
    return scalar("the string " + quote(value));
  }

  bool start_object(size_t) override {
    enter();
    if (depth_ == 1) return true;
    if (depth_ == 2) {
      if (expecting_metadata_) {
        in_metadata_ = true;
      } else {
        in_tensor_ = true;
        seen_ = 0;
        field_ = Field::kOther;
      }
      return true;
    }
    return nested("an object");
  }

  bool key(string_t& name) override {
    if (depth_ == 1) {
      expecting_metadata_ = name == "__metadata__";
      if (expecting_metadata_ && std::exchange(had_metadata_, true)) {
        fail("\"__metadata__\" appears twice");
      }
      entry_ = SafetensorsEntry();
      entry_.name = std::move(name);
    } else if (depth_ == 2 && in_tensor_) {
      field_ = name == "dtype"          ? Field::kDtype
               : name == "shape"        ? Field::kShape
               : name == "data_offsets" ? Field::kOffsets
                                        : Field::kOther;
      if (field_ != Field::kOther) {
        if (seen_ & bit(field_)) fail("\"" + name + "\" appears twice");
        seen_ |= bit(field_);
      }
      n_offsets_ = 0;
    }
    return true;
  }

  bool end_object() override {
    if (depth_ == 2 && in_tensor_) {
      for (auto [field, name] : {std::pair{Field::kDtype, "dtype"},
                                 {Field::kShape, "shape"},
                                 {Field::kOffsets, "data_offsets"}}) {
        if (!(seen_ & bit(field))) fail(std::string("\"") + name + "\" is missing");
      }
      check_size();
      entries_.push_back(std::move(entry_));
      in_tensor_ = false;
    }
    if (depth_ == 2) in_metadata_ = expecting_metadata_ = false;
    depth_--;
    return true;
  }

  bool start_array(size_t) override {
    enter();
    if (depth_ == 1) fail("expected an object, found a list");
    if (depth_ == 3 && in_tensor_ && (field_ == Field::kShape || field_ == Field::kOffsets)) {
      return true;
    }
    return nested("a list");
  }

  bool end_array() override {
    if (depth_ == 3 && in_tensor_ && field_ == Field::kOffsets && n_offsets_ != 2) {
      fail("\"data_offsets\": expected 2 numbers, found " + std::to_string(n_offsets_));
    }
    depth_--;
    return true;
  }

  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& error) override {
    fail(std::string("not valid JSON: ") + describe(error));
  }

 private:
  enum class Field : uint8_t { kDtype, kShape, kOffsets, kOther };
  static unsigned bit(Field field) { return 1u << static_cast<unsigned>(field); }

  bool at_metadata_value() const { return depth_ == 1 && expecting_metadata_; }

  void enter() {
    constexpr int kDeepest = 127;  // the reference implementation's limit
    if (++depth_ > kDeepest) {
      fail("nested more than " + std::to_string(kDeepest) + " levels deep");
    }
  }

  // A value that is no container, somewhere it has no meaning of its own.
  bool scalar(const std::string& what) {
    if (depth_ == 0) fail("expected an object, found " + what);
    if (at_metadata_value()) fail("\"__metadata__\": expected an object, found " + what);
    if (depth_ == 1) fail("tensor " + quote(entry_.name) + ": expected an object, found " + what);
    if (in_metadata_) fail("\"__metadata__\": expected strings, found " + what);
    if (field_ == Field::kOther) return true;  // fields that later versions may add
    if (field_ == Field::kDtype) fail("\"dtype\": expected a string, found " + what);
    const char* name = field_ == Field::kShape ? "shape" : "data_offsets";
    fail(std::string("\"") + name + "\": expected " + (depth_ == 2 ? "a list of " : "") +
         "integers from 0 to 2^64 - 1, found " + what);
  }

  // A container within a tensor, the metadata or the top.
  bool nested(const std::string& what) {
    depth_--;  // the checks speak of where the container stands
    scalar(what);
    depth_++;
    return true;
  }

  // shape x dtype against the byte range, in checked arithmetic.
  void check_size() const {
    uint64_t n = 1;
    for (uint64_t dim : entry_.shape) {
      if (__builtin_mul_overflow(n, dim, &n)) fail("\"shape\": its product exceeds 2^64");
    }
    uint64_t n_bits;
    if (__builtin_mul_overflow(n, bits_, &n_bits)) fail("\"shape\": its bits exceed 2^64");
    if (n_bits % 8 != 0) fail("its values do not fill whole bytes");
    if (entry_.end < entry_.begin) {
      fail("\"data_offsets\": the end " + std::to_string(entry_.end) + " is before the begin " +
           std::to_string(entry_.begin));
    }
    if (entry_.end - entry_.begin != n_bits / 8) {
      fail("\"data_offsets\": dtype and shape need " + std::to_string(n_bits / 8) +
           " bytes, the offsets hold " + std::to_string(entry_.end - entry_.begin));
    }
  }

  const std::filesystem::path& path_;
  const char* begin_;
  const char* furthest_;
  std::vector<SafetensorsEntry> entries_;

  int depth_ = 0;                    // containers around the current value
  bool expecting_metadata_ = false;  // the last key at the top was "__metadata__"
  bool had_metadata_ = false;
  bool in_metadata_ = false;
  bool in_tensor_ = false;
  Field field_ = Field::kOther;  // the last key in a tensor
  unsigned seen_ = 0;            // fields the tensor had, one bit each
  int n_offsets_ = 0;
  uint64_t bits_ = 0;       // of one value of the tensor's dtype
  SafetensorsEntry entry_;  // being read; offsets from the start of the data
};

void check_names(const std::filesystem::path& path, const std::vector<SafetensorsEntry>& entries) {
  std::unordered_set<std::string_view> names;
  names.reserve(entries.size());
  for (const SafetensorsEntry& entry : entries) {
    if (!names.insert(entry.name).second) {
      throw ModelError(path.string() + ": safetensors header: tensor " + quote(entry.name) +
                       " appears twice");
    }
  }
}

// The tensors' ranges must tile the bytes after the header exactly.
void check_layout(const std::filesystem::path& path, uint64_t data_bytes,
                  const std::vector<SafetensorsEntry>& entries) {
  uint64_t at = 0;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.begin != at) {
      throw ModelError(path.string() + ": tensor " + quote(entry.name) +
                       ": \"data_offsets\": expected to begin at " + std::to_string(at) +
                       " (no holes, no overlaps), begins at " + std::to_string(entry.begin));
    }
    at = entry.end;
  }
  if (at != data_bytes) {
    throw ModelError(path.string() + ": the header describes " + std::to_string(at) +
                     " bytes of tensors, the file holds " + std::to_string(data_bytes));
  }
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  SafetensorsFile result;
  result.file = MappedFile::open(path);
  const MappedFile& file = result.file;
  const auto fail = [&](const std::string& what) { throw ModelError(path.string() + ": " + what); };
  const char* bytes = reinterpret_cast<const char*>(file.data());

  constexpr std::string_view kPointer = "version https://git-lfs";
  if (file.bytes() >= kPointer.size() && std::string_view(bytes, kPointer.size()) == kPointer) {
    fail("is a git-LFS pointer, not the weights; fetch them with `git lfs pull`");
  }
  if (file.bytes() < 8) {
    fail("expected at least 8 bytes (safetensors header length), found " +
         std::to_string(file.bytes()));
  }
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | file.data()[i];
  if (header_bytes > kSafetensorsHeaderCap) {
    fail("safetensors header length: expected at most " + std::to_string(kSafetensorsHeaderCap) +
         " bytes, found " + std::to_string(header_bytes));
  }
  if (header_bytes > file.bytes() - 8) {
    fail("safetensors header length: " + std::to_string(header_bytes) +
         " bytes reach beyond the end of the file of " + std::to_string(file.bytes()) + " bytes");
  }
  const char* begin = bytes + 8;
  const char* end = begin + header_bytes;
  if (header_bytes == 0 || *begin != '{') fail("safetensors header: expected to begin with '{'");
  // The JSON reader takes a NUL for the end of its input.
  if (const void* nul = std::memchr(begin, 0, header_bytes)) {
    fail("safetensors header, byte " + std::to_string(static_cast<const char*>(nul) - begin) +
         ": NUL is not JSON");
  }

  HeaderReader reader(path, begin);
  nlohmann::json::sax_parse(CountingIterator{begin, reader.furthest()},
                            CountingIterator{end, reader.furthest()}, &reader);
  result.entries = reader.take_entries();
  check_names(path, result.entries);
  std::stable_sort(result.entries.begin(), result.entries.end(),
                   [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
                     return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
                   });
  check_layout(path, file.bytes() - 8 - header_bytes, result.entries);
  for (SafetensorsEntry& entry : result.entries) {  // no overflow: the ranges lie in the file
    entry.begin += 8 + header_bytes;
    entry.end += 8 + header_bytes;
  }
  file.check_read();
  return result;
}

}  // namespace mustafar
