// The scheduler of emulated threads; cuda_runtime.h beside this says what is emulated and how.

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = size_t{64} << 10;

// A fiber, made once and used for one emulated thread after another. It starts by way of its
// context, and then changes over by jumps, which unlike swapcontext() need no system calls.
struct Fiber {
  ucontext_t start = {};
  jmp_buf resume = {};
  bool started = false;
  std::unique_ptr<unsigned char[]> stack;
  alignas(kExchangeBytes) unsigned char exchange[kExchangeBytes] = {};
};

// Threads that have come to a barrier, which opens when there are `expected` of them.
struct Barrier {
  unsigned expected = 0;
  std::vector<unsigned> waiting;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // by thread of the block
jmp_buf scheduler;
unsigned current;             // the thread that runs, of a block numbered x first
std::vector<unsigned> ready;  // threads that could run
unsigned finished;
Barrier block_barrier;
std::vector<Barrier> warp_barriers;
const std::function<void()>* body;
std::mt19937 random_order;

// Dynamic shared memory, and behind it a margin in which nobody may write.
struct alignas(16) Line {
  unsigned char bytes[16];
};
constexpr size_t kMarginLines = 4;
constexpr unsigned char kNaN = 0xff;  // every byte of a NaN, in all floating-point types
std::vector<Line> dynamic_shared;

void back_to_scheduler() {
  if (_setjmp(fibers[current]->resume) == 0) _longjmp(scheduler, 1);
}

void run_until_it_waits(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void fiber_main() {
  for (;;) {
    (*body)();
    ++finished;
    back_to_scheduler();  // which comes back for the thread of the next block
  }
}

void make_fibers(unsigned count) {
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<unsigned char[]>(kStackBytes);
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = kStackBytes;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    fibers.push_back(std::move(fiber));
  }
}

void wait(Barrier& barrier) {
  barrier.waiting.push_back(current);
  if (barrier.waiting.size() == barrier.expected) {
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }
  back_to_scheduler();
}

void check_margin() {
  const auto* end = dynamic_shared_memory() + dynamic_shared.size() * sizeof(Line);
  if (!std::all_of(end - kMarginLines * sizeof(Line), end,
                   [](auto byte) { return byte == kNaN; })) {
    throw std::runtime_error("CUDA emulator: a thread wrote behind the block's shared memory");
  }
}

// A thread that could run, any of them.
unsigned take_ready_thread() {
  std::swap(ready[random_order() % ready.size()], ready.back());
  const unsigned thread = ready.back();
  ready.pop_back();
  return thread;
}

void run_block(unsigned threads) {
  finished = 0;
  block_barrier = {threads, {}};
  std::memset(static_cast<void*>(dynamic_shared.data()), kNaN,
              dynamic_shared.size() * sizeof(Line));
  warp_barriers.assign((threads + kWarp - 1) / kWarp, {});
  for (unsigned thread = 0; thread < threads; ++thread) {
    ready.push_back(thread);
    ++warp_barriers[thread / kWarp].expected;
  }
  while (!ready.empty()) {
    current = take_ready_thread();
    threadIdx.x = current % blockDim.x;
    threadIdx.y = current / blockDim.x;
    run_until_it_waits(*fibers[current]);
  }
  if (finished == threads) return check_margin();
  const size_t at_barrier = block_barrier.waiting.size();
  fibers.clear();  // they are in the middle of a kernel
  throw std::runtime_error(
      "CUDA emulator: threads wait for ones that never come: of " + std::to_string(threads) +
      " threads of a block, " + std::to_string(finished) + " have finished, " +
      std::to_string(at_barrier) + " are at a barrier of the block, the others in a warp shuffle");
}

}  // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread, size_t shared_bytes) {
  const unsigned threads = block.x * block.y;
  blockDim = block;
  gridDim = grid;
  body = &thread;
  make_fibers(threads);
  dynamic_shared.resize((shared_bytes + sizeof(Line) - 1) / sizeof(Line) + kMarginLines);
  for (blockIdx = dim3(0); blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

unsigned char* dynamic_shared_memory() {
  return dynamic_shared.data()->bytes;
}

void wait_for_block() {
  wait(block_barrier);
}

void wait_for_warp() {
  wait(warp_barriers[current / kWarp]);
}

unsigned this_thread() {
  return current;
}

unsigned char* exchange_slot(unsigned thread) {
  return fibers[thread]->exchange;
}

}  // namespace cuda_emulator

// For Python: what the next calls of operators emulate, and the seed of the threads' order.
extern "C" __attribute__((visibility("default"))) void configure_cuda_emulator(
    int64_t max_blocks, int64_t largest_narrow_index, uint32_t seed) {
  cuda_emulator::settings = {max_blocks, largest_narrow_index};
  cuda_emulator::random_order.seed(seed);
}
