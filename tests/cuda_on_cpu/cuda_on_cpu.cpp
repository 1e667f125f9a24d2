// Fibers, their schedule, barriers and collectives.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 * 1024;  // the sanitizers' frames are large; pages not touched cost nothing

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Fiber {
  Thread thread;
  State state = State::kReady;
  int line = 0;  // of the barrier or collective it waits in
  const char* what = "";
  char* stack = nullptr;
  std::vector<std::vector<Copy>> copies;  // groups; the last is still open
  void* fake_stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Lanes of one mask that meet; kept by the lowest lane of the mask, so that disjoint masks do not disturb each other.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  int generation = 0, line = 0;
  const char* what = "";
  // Two sets of slots: a lane can be one meeting ahead of another that has not read yet, never two.
  unsigned char slots[2][kLanes * kSlotBytes];
};

struct Block {
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Meeting[]>> warps;
  Fiber* running = nullptr;
  unsigned char* shared = nullptr;
  int at_barrier = 0;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
};
Block block;
std::vector<char*> stacks;
uint64_t random_state = 0;

uint64_t draw() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

char* stack_of(size_t index) {
  while (stacks.size() <= index) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stack of thread %zu", index);
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[index];
}

#if defined(__x86_64__)
// Saves the callee's registers on the stack, keeps its pointer in *from, and goes on where `to` was left.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

void to_scheduler(Fiber& fiber, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, block.scheduler_stack, block.scheduler_size);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&fiber.stack_pointer, block.scheduler);
#else
  swapcontext(&fiber.context, &block.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_size);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
  Fiber& fiber = *block.running;
  (*block.body)();
  fiber.state = State::kDone;
  to_scheduler(fiber, true);
  std::abort();  // never resumed
}

void prepare(Fiber& fiber, char* stack) {
  fiber.stack = stack;
#if defined(__x86_64__)
  // As if entry() had been called from nowhere: the return address of the first switch, six registers below it.
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  *top = reinterpret_cast<void*>(&entry);
  fiber.stack_pointer = top - 6;
  std::fill(top - 6, top, nullptr);
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &entry, 0);
#endif
}

void resume(Fiber& fiber) {
  block.running = &fiber;
  current = &fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&block.scheduler, fiber.stack_pointer);
#else
  swapcontext(&block.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

size_t index_of(const Fiber& fiber) { return static_cast<size_t>(&fiber - block.fibers.data()); }

// Which threads wait where, once nothing can run.
[[noreturn]] void deadlock() {
  std::fprintf(stderr, "cuda_on_cpu: deadlock in block (%u, %u, %u)\n", current->block_index.x, current->block_index.y,
               current->block_index.z);
  const char* names[] = {"can run", "waits in __syncthreads", "waits in", "has left"};
  for (size_t i = 0; i < block.fibers.size();) {
    const Fiber& f = block.fibers[i];
    size_t j = i + 1;
    while (j < block.fibers.size() && block.fibers[j].state == f.state && block.fibers[j].line == f.line) ++j;
    std::fprintf(stderr, "  threads %zu to %zu: %s %s line %d\n", i, j - 1, names[static_cast<int>(f.state)], f.what,
                 f.line);
    i = j;
  }
  std::abort();
}

void run_block() {
  const size_t count = block.fibers.size();
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  size_t done = 0;
  while (done < count) {
    for (size_t i = count - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
    bool ran = false;
    for (const size_t i : order) {
      Fiber& fiber = block.fibers[i];
      if (fiber.state != State::kReady) continue;
      ran = true;
      resume(fiber);
      done += fiber.state == State::kDone;
    }
    if (!ran) deadlock();
  }
}

}  // namespace

Thread* current = nullptr;

void fail(const char* format, ...) {
  std::fprintf(stderr, "cuda_on_cpu: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

void* shared_memory() { return block.shared; }

size_t shared_memory_of_device() {
  const char* bytes = std::getenv("CUDA_ON_CPU_SHARED");
  return bytes ? std::strtoull(bytes, nullptr, 10) : 99 * 1024;
}

unsigned lane() { return static_cast<unsigned>(index_of(*block.running) % kLanes); }

void block_barrier(int line) {
  Fiber& own = *block.running;
  own.line = line;
  own.what = "";
  for (const Fiber& other : block.fibers) {
    if (other.state == State::kAtBarrier && other.line != line) {
      fail("divergent __syncthreads: thread %zu is in line %d, thread %zu in line %d", index_of(own), line,
           index_of(other), other.line);
    }
    if (other.state == State::kDone)
      fail("__syncthreads in line %d: thread %zu has left before", line, index_of(other));
  }
  if (++block.at_barrier == static_cast<int>(block.fibers.size())) {
    block.at_barrier = 0;
    for (Fiber& other : block.fibers) other.state = State::kReady;
  } else {
    own.state = State::kAtBarrier;
  }
  to_scheduler(own, false);  // also the last to arrive: anyone may go on first
}

const unsigned char* exchange(uint32_t mask, const void* value, size_t bytes, const char* what, int line) {
  Fiber& own = *block.running;
  const size_t index = index_of(own), first = index / kLanes * kLanes;
  const unsigned me = static_cast<unsigned>(index % kLanes);
  if (!(mask >> me & 1u)) fail("%s in line %d: lane %u calls it with mask %08x, which lacks it", what, line, me, mask);
  for (unsigned l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1u)) continue;
    if (first + l >= block.fibers.size() || block.fibers[first + l].state == State::kDone) {
      fail("%s in line %d: lane %u of mask %08x does not exist or has left", what, line, l, mask);
    }
  }
  Meeting& meeting = block.warps[index / kLanes][__builtin_ctz(mask)];
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.line = line;
    meeting.what = what;
  } else if (meeting.mask != mask || meeting.line != line || std::strcmp(meeting.what, what) != 0) {
    fail("divergent warp: lane %u is in %s, line %d, mask %08x; others in %s, line %d, mask %08x", me, what, line, mask,
         meeting.what, meeting.line, meeting.mask);
  }
  unsigned char* slots = meeting.slots[meeting.generation & 1];
  if (bytes > 0) std::memcpy(slots + me * kSlotBytes, value, bytes);
  meeting.arrived |= 1u << me;
  own.line = line;
  own.what = what;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
    for (unsigned l = 0; l < kLanes; ++l) {
      if (mask >> l & 1u) block.fibers[first + l].state = State::kReady;
    }
  } else {
    own.state = State::kInCollective;
  }
  to_scheduler(own, false);
  return slots;
}

void copy_begin(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (inside && reinterpret_cast<uintptr_t>(from) % 16)) {
    fail("copy_async16 from %p to %p: not 16-byte aligned", from, to);
  }
  auto& groups = block.running->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, inside});
}

void copy_commit() {
  auto& groups = block.running->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void copy_wait(int left) {
  auto& groups = block.running->copies;
  while (groups.size() > static_cast<size_t>(left) + 1) {  // the last one is still open
    for (const Copy& c : groups.front()) {
      if (c.inside) {
        std::memcpy(c.to, c.from, 16);
      } else {
        std::memset(c.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

void run(const std::function<void()>& body, dim3 grid, dim3 threads, size_t shared) {
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  if (count == 0 || count > 1024) fail("a block of %llu threads", static_cast<unsigned long long>(count));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("an empty grid");
  if (grid.y > 65535 || grid.z > 65535) fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  if (shared > shared_memory_of_device()) {
    fail("%zu bytes of shared memory on a device that has %zu", shared, shared_memory_of_device());
  }
  const char* seed = std::getenv("CUDA_ON_CPU_SEED");
  random_state = 0x9E3779B97F4A7C15u ^ (seed ? std::strtoull(seed, nullptr, 10) * 0x2545F4914F6CDD1Du : 0);
  block.body = &body;
  for (uint64_t b = 0; b < static_cast<uint64_t>(grid.x) * grid.y * grid.z; ++b) {
    // aligned_alloc asks for a multiple of the alignment; posix_memalign ends where it is told to.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, std::max<size_t>(shared, 1))) fail("no memory");
    std::memset(memory, 0xFF, std::max<size_t>(shared, 1));
    block.shared = static_cast<unsigned char*>(memory);
    block.fibers.clear();
    block.fibers.resize(count);
    while (block.warps.size() * kLanes < count) block.warps.push_back(std::make_unique<Meeting[]>(kLanes));
    block.at_barrier = 0;
    for (uint64_t i = 0; i < count; ++i) {
      Fiber& f = block.fibers[i];
      const unsigned t = static_cast<unsigned>(i);
      f.thread.thread_index = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
      f.thread.block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                              static_cast<unsigned>(b / grid.x / grid.y)};
      f.thread.block_size = threads;
      f.thread.grid_size = grid;
      prepare(f, stack_of(i));
    }
    run_block();
    std::free(memory);
  }
  current = nullptr;
  block.body = nullptr;
}

}  // namespace cuda_on_cpu
