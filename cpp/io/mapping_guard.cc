#include "io/mapping_guard.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string_view>

#include "core/fork.h"

namespace mustafar {

// Read by the handler, which may interrupt anything and takes no lock.
struct MappingGuard::Slot {
  std::atomic<uint64_t> version{0};         // odd while begin and end are changed
  std::atomic<uintptr_t> begin{0}, end{0};  // addresses of whole pages; begin 0: free
  std::atomic<bool> lost{false};
};

namespace {

using Slot = MappingGuard::Slot;

// Slots are never given back, so that the handler can't meet one that is gone.
struct Chunk {
  Slot slots[32];
  std::atomic<Chunk*> next{nullptr};
};

Chunk first_chunk;
ForkSafeMutex registry;  // held by those who change slots, or the handler
int64_t n_guarded = 0;   // under the lock

uintptr_t page_bytes = 4096;                 // set before the handler is there
struct sigaction previous{};                 // likewise; who gets what is not ours
std::atomic<bool> previous_is_spent{false};  // it asked to be called once (SA_RESETHAND)

void set(Slot& slot, uintptr_t begin, uintptr_t end) {
  slot.version++;
  slot.begin = begin;
  slot.end = end;
  slot.version++;
}

// The slot of the mapping that an address lies in, and the mapping's end.
Slot* find(uintptr_t address, uintptr_t& end) {
  for (Chunk* chunk = &first_chunk; chunk != nullptr; chunk = chunk->next) {
    for (Slot& slot : chunk->slots) {
      const uint64_t version = slot.version;
      const uintptr_t begin = slot.begin;
      end = slot.end;
      // A slot that is being changed is another's: the mapping of a page that is read just now
      // stays.
      if (version % 2 != 0 || version != slot.version) continue;
      if (begin <= address && address < end) return &slot;
    }
  }
  return nullptr;
}

// Zeros from the page of an address to the mapping's end. False where that can't be done, or the
// address is nobody's.
bool replace_lost_pages(uintptr_t address) {
  uintptr_t end = 0;
  Slot* const slot = find(address, end);
  if (slot == nullptr) return false;
  slot->lost = true;
  const uintptr_t page = address / page_bytes * page_bytes;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): where the kernel says the page is
  return ::mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

// As the kernel would have called the handler that was there before.
void forward(int signal, siginfo_t* info, void* context) {
  const bool sent = info->si_code <= 0;  // by somebody: there is no access that would fail again
  const bool takes_info = (previous.sa_flags & SA_SIGINFO) != 0;
  const bool ignored = !takes_info && previous.sa_handler == SIG_IGN;
  if (ignored && sent) return;
  if (ignored || (!takes_info && previous.sa_handler == SIG_DFL) || previous_is_spent) {
    // What failed fails again when this returns, or the signal comes again, and ends the process.
    struct sigaction standard{};
    standard.sa_handler = SIG_DFL;
    ::sigaction(SIGBUS, &standard, nullptr);
    if (sent) ::raise(SIGBUS);
    return;
  }
  if ((previous.sa_flags & static_cast<int>(SA_RESETHAND)) != 0) previous_is_spent = true;
  sigset_t mask, old;
  ::pthread_sigmask(SIG_BLOCK, &previous.sa_mask, &old);
  if ((previous.sa_flags & SA_NODEFER) != 0) {
    sigemptyset(&mask);
    sigaddset(&mask, SIGBUS);
    ::pthread_sigmask(SIG_UNBLOCK, &mask, nullptr);
  }
  if (takes_info) {
    previous.sa_sigaction(signal, info, context);
  } else {
    previous.sa_handler(signal);
  }
  ::pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  // A page that can't be had. Others are accesses that are not aligned, and memory that broke.
  const bool gone = info->si_code == BUS_ADRERR || info->si_code == BUS_OBJERR;
  if (!gone || !replace_lost_pages(reinterpret_cast<uintptr_t>(info->si_addr))) {
    forward(signal, info, context);
  }
  errno = error;
}

// Whether ours is the handler that the kernel calls; `now` is whichever is.
bool is_ours(struct sigaction& now) {
  ::sigaction(SIGBUS, nullptr, &now);
  return (now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_sigbus;
}

// Put in and not taken out again. Where the kernel calls another handler since, that one was put on
// top, and is taken to call ours: it must not be called by ours in turn.
bool in_chain = false;

void install() {
  struct sigaction now{};
  if (is_ours(now)) return;
  const bool calls_nobody =
      (now.sa_flags & SA_SIGINFO) == 0 && (now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN);
  if (in_chain && !calls_nobody) return;
  page_bytes = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  previous = now;
  previous_is_spent = false;
  struct sigaction ours{};
  ours.sa_sigaction = on_sigbus;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | (now.sa_flags & SA_RESTART);
  sigemptyset(&ours.sa_mask);
  ::sigaction(SIGBUS, &ours, nullptr);
  in_chain = true;
}

void uninstall() {
  struct sigaction now{};
  if (!is_ours(now)) return;
  ::sigaction(SIGBUS, &previous, nullptr);
  in_chain = false;
}

bool wanted() {
  const char* const setting = std::getenv("MUSTAFAR_SIGBUS");
  return setting == nullptr || std::string_view(setting) != "off";
}

Slot& free_slot() {
  for (Chunk* chunk = &first_chunk;; chunk = chunk->next) {
    for (Slot& slot : chunk->slots) {
      if (slot.begin == 0) return slot;
    }
    if (chunk->next == nullptr) chunk->next = new Chunk;
  }
}

}  // namespace

MappingGuard::MappingGuard(const void* data, size_t bytes) {
  if (data == nullptr || bytes == 0 || !wanted()) return;
  const std::lock_guard lock(registry);
  Slot& slot = free_slot();
  install();
  n_guarded++;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  slot.lost = false;
  set(slot, begin, begin + (bytes + page_bytes - 1) / page_bytes * page_bytes);
  slot_ = &slot;
}

MappingGuard::~MappingGuard() {
  if (slot_ == nullptr) return;
  const std::lock_guard lock(registry);
  set(*slot_, 0, 0);
  if (--n_guarded == 0) uninstall();
}

bool MappingGuard::lost() const { return slot_ != nullptr && slot_->lost; }

}  // namespace mustafar
