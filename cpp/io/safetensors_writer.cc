#include "io/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/json_tree.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

// Bytes of an element, from the number at the end of the dtype's name.
int64_t element_bytes(const std::string& dtype) {
  return std::stoll(dtype.substr(dtype.find_first_of("0123456789"))) / 8;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(std::filesystem::path path,
                                     std::vector<DeclaredTensor> tensors)
    : path_(std::move(path)) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return element_bytes(a.dtype) > element_bytes(b.dtype);
  });
  JsonObjectText header, metadata;
  metadata.add("format", "pt");  // transformers looks for it
  header.add_text("__metadata__", metadata.take());
  int64_t end = 0;
  for (const DeclaredTensor& tensor : tensors) {
    JsonListText shape, offsets;
    for (const int64_t extent : tensor.shape) shape.add_text(std::to_string(extent));
    offsets.add_text(std::to_string(end));
    offsets.add_text(std::to_string(end + tensor.bytes));
    JsonObjectText entry;
    entry.add("dtype", tensor.dtype);
    entry.add_text("shape", shape.take());
    entry.add_text("data_offsets", offsets.take());
    header.add_text(tensor.name, entry.take());
    places_[tensor.name] = {end, tensor.bytes, false};
    end += tensor.bytes;
  }
  std::string text = header.take();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  for (auto& [name, place] : places_) place.at += 8 + static_cast<int64_t>(length);

  do {
    fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  } while (fd_ < 0 && errno == EINTR);
  if (fd_ < 0) fail("cannot create");
  try {
    write_at(0, &length, 8);
    write_at(8, text.data(), static_cast<int64_t>(length));
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void SafetensorsWriter::fail(const char* what) const {
  const std::string reason = std::strerror(errno);
  throw Error(std::string(what) + " " + path_.string() + ": " + reason);
}

void SafetensorsWriter::write_at(int64_t at, const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd_, p, static_cast<size_t>(std::min(bytes, int64_t{1} << 30)), at);
    if (n < 0) {
      if (errno == EINTR) continue;
      fail("cannot write");
    }
    p += n;
    at += n;
    bytes -= n;
  }
}

void SafetensorsWriter::write(const std::string& name, const void* data) {
  Place& place = places_.at(name);
  if (place.written) throw std::logic_error("tensor " + name + " is written twice");
  write_at(place.at, data, place.bytes);
  place.written = true;
}

void SafetensorsWriter::finish() {
  for (const auto& [name, place] : places_) {
    if (!place.written) throw std::logic_error("tensor " + name + " was not written");
  }
  while (::fsync(fd_) != 0) {
    if (errno != EINTR) fail("cannot flush");
  }
  ::close(std::exchange(fd_, -1));
}

}  // namespace mustafar
