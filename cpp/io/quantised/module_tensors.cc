#include "io/quantised/module_tensors.h"

#include <algorithm>
#include <utility>

#include "mustafar/error.h"

namespace mustafar {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t dim : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

// Without dimensions of 1 at the end, by which writers of scales differ.
std::vector<int64_t> trimmed(std::vector<int64_t> shape) {
  while (!shape.empty() && shape.back() == 1) shape.pop_back();
  return shape;
}

}  // namespace

ModuleTensors::ModuleTensors(std::string where, std::string module, Find find)
    : where_(std::move(where)), module_(std::move(module)), find_(std::move(find)) {}

bool ModuleTensors::has(const char* suffix) const {
  StoredPart part;
  return find_(module_ + "." + suffix, part);
}

std::string_view ModuleTensors::dtype(const char* suffix) const {
  StoredPart part;
  return find_(module_ + "." + suffix, part) ? part.dtype : std::string_view();
}

std::vector<int64_t> ModuleTensors::shape(const char* suffix) const {
  StoredPart part;
  find_(module_ + "." + suffix, part);
  return part.shape;
}

StoredPart ModuleTensors::take(const char* suffix) {
  StoredPart part;
  if (!find_(module_ + "." + suffix, part)) {
    throw ModelError(where_ + ": tensor \"" + module_ + "." + suffix +
                     "\" is missing beside the quantised weights of its module");
  }
  taken_.push_back(part);
  return part;
}

StoredPart ModuleTensors::take(const char* suffix, std::initializer_list<std::string_view> dtypes,
                               const std::vector<int64_t>& shape) {
  StoredPart part = take(suffix);
  if (std::find(dtypes.begin(), dtypes.end(), part.dtype) == dtypes.end()) {
    std::string expected;
    for (const std::string_view dtype : dtypes) {
      expected += (expected.empty() ? "" : " or ") + std::string(dtype);
    }
    fail(part, "expected dtype " + expected + ", found " + std::string(part.dtype));
  }
  if (part.shape != shape) {
    fail(part, "expected shape " + shape_text(shape) + ", found " + shape_text(part.shape));
  }
  return part;
}

StoredPart ModuleTensors::take_scales(const char* suffix, const std::vector<int64_t>& shape,
                                      DType& dtype) {
  StoredPart part = take(suffix);
  if (part.dtype == "F16") {
    dtype = DType::kF16;
  } else if (part.dtype == "BF16") {
    dtype = DType::kBF16;
  } else if (part.dtype == "F32") {
    dtype = DType::kF32;
  } else {
    fail(part, "expected dtype F16, BF16 or F32, found " + std::string(part.dtype));
  }
  if (trimmed(part.shape) != trimmed(shape)) {
    fail(part, "expected shape " + shape_text(shape) + ", found " + shape_text(part.shape));
  }
  return part;
}

void ModuleTensors::fail(const StoredPart& part, const std::string& what) const {
  throw ModelError(part.file->path().string() + ": tensor \"" + part.name + "\": " + what);
}

}  // namespace mustafar
