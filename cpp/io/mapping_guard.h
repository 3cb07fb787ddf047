// A mapped file's pages may go while they are mapped: somebody makes the file shorter, or the disk
// can't be read. Touching such a page raises SIGBUS, which ends a process.
//
// While there is a guarded mapping, this process has a handler for SIGBUS that puts zeros in the
// place of pages that such a mapping has lost, and notes that it did: the reader goes on, on
// whatever thread and in the midst of whatever, and asks lost() before it uses what it made of
// them. SIGBUS of any other address, or sent by somebody, goes to the handler that was there
// before. Once no mapping is guarded that one is put back, unless another has been put on top
// meanwhile.
//
// MUSTAFAR_SIGBUS=off in the environment leaves SIGBUS to the program: nothing is guarded then.
#pragma once

#include <cstddef>
#include <utility>

namespace mustafar {

class MappingGuard {
 public:
  MappingGuard() = default;
  // data: of a mapping of so many bytes that is there for as long as the guard, or null.
  MappingGuard(const void* data, size_t bytes);
  ~MappingGuard();
  MappingGuard(MappingGuard&& other) noexcept : slot_(std::exchange(other.slot_, nullptr)) {}
  MappingGuard& operator=(MappingGuard&& other) noexcept {
    std::swap(slot_, other.slot_);
    return *this;
  }

  // Whether a page that was gone has been read.
  bool lost() const;

  struct Slot;

 private:
  Slot* slot_ = nullptr;
};

}  // namespace mustafar
