#include "simt.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, takes over another stack and what was
// saved there. swapcontext does the same with two system calls each time.
extern "C" void simt_switch_stack(void** save, void* to);
asm(R"(
.text
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // sanitizers need deep frames
constexpr size_t kStackStagger = 17 * 64;  // bytes; odd in cache lines
constexpr int kWarp = 32;

enum class State : uint8_t { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  unsigned char* stack = nullptr;  // kStackBytes
  void* fake_stack = nullptr;      // AddressSanitizer's
  Dim3 thread;
  int index = 0;
  State state = State::kReady;
  uint32_t exchanges = 0;  // collectives done: the parity picks the slots
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
};

struct Warp {
  int arrived = 0;
  const char* collective = nullptr;
  unsigned char slots[2][kWarp * kExchangeBytes];
};

struct Run {
  Dim3 grid, block_size, block;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> ready;
  std::mt19937 random;
  int at_block_barrier = 0;
  int done = 0;
  Fiber* current = nullptr;
  unsigned char* shared = nullptr;
  std::string error;
#if defined(__x86_64__)
  void* scheduler_stack_pointer = nullptr;
#else
  ucontext_t scheduler;
#endif
  const void* scheduler_stack = nullptr;  // AddressSanitizer's view of it
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
};

Run* g_run = nullptr;
uint32_t g_seed = 0;

struct Failed {};  // unwinds the fiber of a thread that failed

// Of the fibers that are ready, one drawn at random; null where none is.
Fiber* draw_ready() {
  Run& run = *g_run;
  if (run.ready.empty()) return nullptr;
  const size_t pick = uint64_t{run.random()} * run.ready.size() >> 32;
  Fiber* fiber = &run.fibers[run.ready[pick]];
  run.ready[pick] = run.ready.back();
  run.ready.pop_back();
  return fiber;
}

// Leaves the running fiber for another that is ready, or for the scheduler where none is or the run
// has failed. From fiber to fiber directly: a switch returns to where the last one was made, which
// the processor predicts.
void leave(bool ends) {
  Run& run = *g_run;
  Fiber& f = *run.current;
  Fiber* const next = run.error.empty() ? draw_ready() : nullptr;
  if (next == &f) return;
  run.current = next;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(ends ? nullptr : &f.fake_stack,
                                 next ? next->stack : run.scheduler_stack,
                                 next ? kStackBytes : run.scheduler_stack_bytes);
#endif
#if defined(__x86_64__)
  simt_switch_stack(&f.stack_pointer, next ? next->stack_pointer : run.scheduler_stack_pointer);
#else
  swapcontext(&f.context, next ? &next->context : &run.scheduler);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  (void)ends;
}

// From the scheduler to a fiber; comes back when no fiber is ready or the run has failed.
void enter(Fiber& f) {
  g_run->current = &f;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&g_run->scheduler_fake_stack, f.stack, kStackBytes);
#endif
#if defined(__x86_64__)
  simt_switch_stack(&g_run->scheduler_stack_pointer, f.stack_pointer);
#else
  swapcontext(&g_run->scheduler, &f.context);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(g_run->scheduler_fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if SIMT_ASAN
  const void* from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
  if (g_run->scheduler_stack == nullptr) {  // the first fiber of a run is entered from there
    g_run->scheduler_stack = from;
    g_run->scheduler_stack_bytes = bytes;
  }
#endif
  try {
    (*g_run->body)();
  } catch (const Failed&) {  // error says why
  }
  Fiber& f = *g_run->current;
  if (g_run->error.empty() && !(f.open_copies.empty() && f.copy_groups.empty())) {
    g_run->error = "a thread ended with cp.async copies that it never waited for";
  }
  f.state = State::kDone;
  g_run->done++;
  leave(true);
}

void prepare(Fiber& f) {
  f.state = State::kReady;
  f.exchanges = 0;
  f.open_copies.clear();
  f.copy_groups.clear();
  f.fake_stack = nullptr;
#if defined(__x86_64__)
  // As simt_switch_stack leaves a stack: six registers, then where to return. The entry finds the
  // stack aligned as after a call. The stacks lie a power of two apart; their tops must not, or all
  // of them share one set of every cache.
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - f.index % 61 * kStackStagger);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.stack_pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
}

std::string name_of_thread(const Fiber& f) {
  const Dim3 b = g_run->block;
  return "thread " + std::to_string(f.index) + " of block (" + std::to_string(b.x) + ", " +
         std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
}

void make_ready(int index) {
  g_run->fibers[index].state = State::kReady;
  g_run->ready.push_back(index);
}

// A fault in a guard page: says what it means and dies.
void on_fault(int, siginfo_t* info, void*) {
  char text[160];
  const int n = std::snprintf(text, sizeof text,
                              "simt: access out of bounds at %p (guard page of shared or device "
                              "memory)\n",
                              info->si_addr);
  if (write(2, text, n) < 0) _exit(3);
  _exit(2);
}

void install_fault_handler() {
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    return true;
  }();
  (void)installed;
}

void run_block() {
  Run& run = *g_run;
  const int n = static_cast<int>(run.fibers.size());
  run.ready.clear();
  run.at_block_barrier = run.done = 0;
  for (Warp& warp : run.warps) warp.arrived = 0;
  for (int i = 0; i < n; i++) {
    prepare(run.fibers[i]);
    run.ready.push_back(i);
  }
  while (run.done < n) {
    if (run.ready.empty()) {
      for (const Fiber& f : run.fibers) {
        if (f.state != State::kAtBlockBarrier && f.state != State::kAtWarpBarrier) continue;
        const char* where = f.state == State::kAtBlockBarrier
                                ? "sync_block"
                                : run.warps[f.index / kWarp].collective;
        throw Error("deadlock: " + name_of_thread(f) + " waits at " + where +
                    " for threads that never come");
      }
    }
    enter(*draw_ready());
    if (!run.error.empty()) throw Error(run.error);
  }
}

}  // namespace

GuardedMemory::GuardedMemory(size_t bytes) : bytes_(bytes) {
  install_fault_handler();
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t rounded = (bytes + 127) / 128 * 128;
  const size_t usable = (rounded + page - 1) / page * page + page;  // at least a page before it
  mapping_bytes_ = usable + page;
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(mapping);
  mprotect(mapping_ + usable, page, PROT_NONE);
  data_ = mapping_ + usable - rounded;
  fill_slack();
}

GuardedMemory::~GuardedMemory() { munmap(mapping_, mapping_bytes_); }

void GuardedMemory::fill_slack() {
  const size_t before = std::min<size_t>(256, data_ - mapping_);
  std::memset(data_ - before, 0xA5, before);
  const size_t rounded = (bytes_ + 127) / 128 * 128;
  std::memset(data_ + bytes_, 0xA5, rounded - bytes_);
}

void GuardedMemory::check(const char* what) const {
  const size_t before = std::min<size_t>(256, data_ - mapping_);
  const auto damaged = [](const unsigned char* from, size_t n) {
    return std::any_of(from, from + n, [](unsigned char c) { return c != 0xA5; });
  };
  const size_t rounded = (bytes_ + 127) / 128 * 128;
  if (damaged(data_ - before, before)) {
    throw Error(std::string("write before the start of ") + what);
  }
  if (damaged(data_ + bytes_, rounded - bytes_)) {
    throw Error(std::string("write past the end of ") + what + " of " + std::to_string(bytes_) +
                " bytes");
  }
}

void set_seed(uint32_t seed) { g_seed = seed; }
uint32_t seed() { return g_seed; }

void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t n = size_t{block.x} * block.y * block.z;
  if (g_run != nullptr) throw Error("a launch inside a launch");
  if (n == 0 || n % kWarp != 0 || n > 1024) {
    throw Error("a block of " + std::to_string(n) + " threads: not a multiple of 32 up to 1024");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw Error("grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                std::to_string(grid.z) + " is empty or too large");
  }
  if (shared_bytes > (99 << 10)) {
    throw Error(std::to_string(shared_bytes) + " bytes of shared memory: some GPUs have 99 KiB");
  }
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;  // reused by every launch
  while (stacks.size() < n) stacks.push_back(std::make_unique<unsigned char[]>(kStackBytes));
  GuardedMemory shared(shared_bytes);

  Run run;
  run.grid = grid;
  run.block_size = block;
  run.body = &body;
  run.shared = shared.data();
  run.fibers.resize(n);
  run.warps.resize(n / kWarp);
  for (size_t i = 0; i < n; i++) {
    Fiber& f = run.fibers[i];
    const unsigned u = static_cast<unsigned>(i);
    f.stack = stacks[i].get();
    f.index = static_cast<int>(i);
    f.thread = {u % block.x, u / block.x % block.y, u / (block.x * block.y)};
  }
  struct Reset {
    Run& run;
    ~Reset() {
#if SIMT_ASAN
      // A failed launch abandons its fibers in the middle of their frames.
      for (const Fiber& f : run.fibers) {
        if (f.state != State::kDone) ASAN_UNPOISON_MEMORY_REGION(f.stack, kStackBytes);
      }
#endif
      g_run = nullptr;
    }
  } reset{run};
  g_run = &run;
  run.random.seed(g_seed);
  for (run.block.z = 0; run.block.z < grid.z; run.block.z++) {
    for (run.block.y = 0; run.block.y < grid.y; run.block.y++) {
      for (run.block.x = 0; run.block.x < grid.x; run.block.x++) {
        std::memset(shared.data(), 0xCD, shared_bytes);
        run_block();
        shared.check("shared memory");
      }
    }
  }
}

Dim3 thread_index() { return g_run->current->thread; }
Dim3 block_index() { return g_run->block; }
Dim3 block_dim() { return g_run->block_size; }
Dim3 grid_dim() { return g_run->grid; }
int lane() { return g_run->current->index % kWarp; }
unsigned char* dynamic_shared() { return g_run->shared; }

void fail(const std::string& what) {
  g_run->error = what + " (" + name_of_thread(*g_run->current) + ")";
  throw Failed();
}

void sync_block() {
  Run& run = *g_run;
  Fiber& f = *run.current;
  f.state = State::kAtBlockBarrier;
  if (++run.at_block_barrier == static_cast<int>(run.fibers.size())) {
    run.at_block_barrier = 0;
    for (size_t i = 0; i < run.fibers.size(); i++) make_ready(static_cast<int>(i));
  }
  leave(false);
}

const unsigned char* exchange(const char* collective, const void* value, size_t bytes) {
  Run& run = *g_run;
  Fiber& f = *run.current;
  Warp& warp = run.warps[f.index / kWarp];
  if (warp.arrived == 0) {
    warp.collective = collective;
  } else if (warp.collective != collective && std::strcmp(warp.collective, collective) != 0) {
    fail(std::string("lanes of a warp meet at different collectives: ") + warp.collective +
         " and " + collective);
  }
  // Two sets of slots in turn: a lane can't publish its next but one before all have read this one.
  unsigned char* slots = warp.slots[f.exchanges++ & 1];
  std::memcpy(slots + static_cast<size_t>(f.index % kWarp) * kExchangeBytes, value, bytes);
  f.state = State::kAtWarpBarrier;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    const int first = f.index / kWarp * kWarp;
    for (int i = first; i < first + kWarp; i++) make_ready(i);
  }
  leave(false);
  return slots;
}

void cp_async(void* to_shared, const void* from, int bytes) {
  const auto misaligned = [bytes](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0;
  };
  if (misaligned(to_shared) || misaligned(from)) fail("misaligned cp.async");
  g_run->current->open_copies.push_back({to_shared, from, bytes});
}

void cp_async_commit() {
  Fiber& f = *g_run->current;
  f.copy_groups.push_back(std::move(f.open_copies));
  f.open_copies.clear();
}

void cp_async_wait(int groups_in_flight) {
  Fiber& f = *g_run->current;
  while (f.copy_groups.size() > static_cast<size_t>(groups_in_flight)) {
    for (const Copy& copy : f.copy_groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    f.copy_groups.pop_front();
  }
}

}  // namespace simt
