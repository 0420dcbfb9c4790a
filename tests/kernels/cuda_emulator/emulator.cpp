// The scheduler of emulated threads; cuda_runtime.h beside this says what is emulated and how.

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
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

std::vector<std::unique_ptr<Fiber>> fibers;  // of the running block's threads from first_fiber on
size_t first_fiber;
jmp_buf scheduler;
unsigned current;             // the thread that runs, of a block numbered x first
std::vector<unsigned> ready;  // threads that could run
unsigned finished;
Barrier block_barrier;
unsigned blocks_of_cluster;  // 0 outside of clusters; in them, a block's threads follow another's
std::vector<Barrier> barriers_of_blocks;
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
size_t block_lines;  // from one block's to the next one's, in a cluster

// Copies on their way: of threads by their fiber; by the copy engine, loads by their barrier in
// shared memory, stores by their block.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
std::vector<std::vector<Copy>> copies_of_threads;
struct Arrivals {
  bool expecting = false, parity = false;  // of the phase that has not ended
  size_t expected = 0;
  std::vector<Copy> loads;
};
std::map<const uint64_t*, Arrivals> arrivals;
std::map<unsigned, std::vector<Copy>> bulk_stores;
std::string fault;  // a fiber cannot throw

void expect(bool condition, const char* otherwise) {
  if (!condition) fault = otherwise;
}

// Of so many bytes, or multiples of them, at multiples of them.
Copy checked_copy(void* to, const void* from, int bytes, int unit) {
  const auto aligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(unit) == 0;
  };
  expect(bytes > 0 && bytes % unit == 0 && aligned(to) && aligned(from),
         "a copy of no bytes, or at no multiple of what it copies at once");
  return {to, from, static_cast<size_t>(std::max(bytes, 0))};
}

void make(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}

void throw_fault() {
  if (fault.empty()) return;
  blocks_of_cluster = 0;
  throw std::runtime_error("CUDA emulator: " + fault);
}

void back_to_scheduler() {
  if (_setjmp(fibers[first_fiber + current]->resume) == 0) _longjmp(scheduler, 1);
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

void make_fibers(size_t count) {
  copies_of_threads.assign(count, {});
  fault.clear();
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

void check_margin(const Line* end_of_block) {
  const auto* end = reinterpret_cast<const unsigned char*>(end_of_block);
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

// Where the threads of a block wait for other blocks.
struct GridBarrier {
  const unsigned* counter = nullptr;
  unsigned blocks = 0, round = 0;
  bool operator==(const GridBarrier&) const = default;
};
GridBarrier grid_barrier;
unsigned at_grid_barrier;

void start_block(unsigned threads) {
  finished = at_grid_barrier = 0;
  block_barrier = {threads, {}};
  arrivals.clear();
  bulk_stores.clear();
  std::memset(static_cast<void*>(dynamic_shared.data()), kNaN,
              dynamic_shared.size() * sizeof(Line));
  warp_barriers.assign((threads + kWarp - 1) / kWarp, {});
  for (unsigned thread = 0; thread < threads; ++thread) {
    ready.push_back(thread);
    ++warp_barriers[thread / kWarp].expected;
  }
}

// Until all threads of the block have finished or wait for other blocks.
void run_block(unsigned threads) {
  while (!ready.empty()) {
    current = take_ready_thread();
    threadIdx.x = current % blockDim.x;
    threadIdx.y = current / blockDim.x;
    run_until_it_waits(*fibers[first_fiber + current]);
  }
  const Line* const end = dynamic_shared.data() + dynamic_shared.size();
  if (finished == threads || at_grid_barrier == threads) return check_margin(end);
  const size_t at_barrier = block_barrier.waiting.size();
  fibers.clear();  // they are in the middle of a kernel
  throw std::runtime_error(
      "CUDA emulator: threads wait for ones that never come: of " + std::to_string(threads) +
      " threads of a block, " + std::to_string(finished) + " have finished, " +
      std::to_string(at_barrier) + " are at a barrier of the block, " +
      std::to_string(at_grid_barrier) + " wait for other blocks, the others in a warp shuffle");
}

// What a block that waits for others takes up again.
struct WaitingBlock {
  Barrier block_barrier;
  std::vector<Barrier> warp_barriers;
  GridBarrier grid_barrier;
};

}  // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread, size_t shared_bytes) {
  const unsigned threads = block.x * block.y;
  blockDim = block;
  gridDim = grid;
  body = &thread;
  make_fibers(threads);
  dynamic_shared.resize((shared_bytes + sizeof(Line) - 1) / sizeof(Line) + kMarginLines);
  first_fiber = 0;
  for (blockIdx = dim3(0); blockIdx.x < grid.x; ++blockIdx.x) {
    start_block(threads);
    run_block(threads);
    if (finished == threads) continue;
    fibers.clear();
    throw std::runtime_error("CUDA emulator: blocks wait for each other in an ordinary launch");
  }
  throw_fault();
}

void run_grid_together(dim3 grid, dim3 block, const std::function<void()>& thread,
                       size_t shared_bytes) {
  const unsigned threads = block.x * block.y, count = grid.x;
  blockDim = block;
  gridDim = grid;
  body = &thread;
  make_fibers(size_t{count} * threads);
  dynamic_shared.resize((shared_bytes + sizeof(Line) - 1) / sizeof(Line) + kMarginLines);
  std::vector<WaitingBlock> blocks(count);
  std::vector<unsigned> runnable(count), waiting;
  for (unsigned i = 0; i < count; ++i) runnable[i] = i;
  std::vector<bool> started(count, false);
  while (!runnable.empty()) {
    std::swap(runnable[random_order() % runnable.size()], runnable.back());
    const unsigned index = runnable.back();
    runnable.pop_back();
    blockIdx = dim3(index);
    first_fiber = size_t{index} * threads;
    if (started[index]) {
      block_barrier = std::move(blocks[index].block_barrier);
      warp_barriers = std::move(blocks[index].warp_barriers);
      finished = at_grid_barrier = 0;
      for (unsigned t = 0; t < threads; ++t) ready.push_back(t);
    } else {
      start_block(threads);
      started[index] = true;
    }
    run_block(threads);
    if (finished == threads) continue;
    blocks[index] = {std::move(block_barrier), std::move(warp_barriers), grid_barrier};
    waiting.push_back(index);
    std::vector<unsigned> here, elsewhere;
    for (const unsigned other : waiting) {
      (blocks[other].grid_barrier == grid_barrier ? here : elsewhere).push_back(other);
    }
    if (here.size() == grid_barrier.blocks) {
      runnable.insert(runnable.end(), here.begin(), here.end());
      waiting = std::move(elsewhere);
    }
  }
  first_fiber = 0;
  if (waiting.empty()) return throw_fault();
  fibers.clear();
  throw std::runtime_error("CUDA emulator: " + std::to_string(waiting.size()) +
                           " blocks wait for ones that never come");
}

void wait_for_blocks(const unsigned* counter, unsigned blocks, unsigned round) {
  const GridBarrier here{counter, blocks, round};
  if (at_grid_barrier > 0 && !(grid_barrier == here)) {
    std::abort();  // threads of a block at different barriers; a fiber cannot throw
  }
  grid_barrier = here;
  ++at_grid_barrier;
  back_to_scheduler();
}

void run_clusters(unsigned clusters, unsigned cluster, unsigned threads,
                  const std::function<void()>& thread, size_t shared_bytes) {
  blockDim = dim3(threads);
  gridDim = dim3(clusters * cluster);
  body = &thread;
  make_fibers(size_t{cluster} * threads);
  first_fiber = 0;
  blocks_of_cluster = cluster;
  block_lines = (shared_bytes + sizeof(Line) - 1) / sizeof(Line) + kMarginLines;
  dynamic_shared.resize(cluster * block_lines);
  for (unsigned number = 0; number < clusters; ++number) {
    start_block(cluster * threads);
    barriers_of_blocks.assign(cluster, {threads, {}});
    while (!ready.empty()) {
      current = take_ready_thread();
      threadIdx.x = current % threads;
      threadIdx.y = 0;
      blockIdx.x = number * cluster + current / threads;
      run_until_it_waits(*fibers[current]);
    }
    if (finished == cluster * threads) {
      for (unsigned block = 0; block < cluster; ++block) {
        check_margin(dynamic_shared.data() + (block + 1) * block_lines);
      }
      for (const auto& [block, stores] : bulk_stores) {
        expect(stores.empty(), "a bulk store that nobody waited for");
      }
      throw_fault();
      continue;
    }
    blocks_of_cluster = 0;
    fibers.clear();
    throw std::runtime_error("CUDA emulator: threads of a cluster wait for ones that never come");
  }
  blocks_of_cluster = 0;
}

void cluster_wait() {
  if (blocks_of_cluster == 0) std::abort();
  wait(block_barrier);
}

void copy_later(void* to, const void* from, int bytes) {
  copies_of_threads[first_fiber + current].push_back(checked_copy(to, from, bytes, bytes));
}

void wait_for_copies() {
  make(copies_of_threads[first_fiber + current]);
}

void begin_arrivals(uint64_t* barrier) {
  arrivals[barrier] = {};
}

void expect_bytes(uint64_t* barrier, int bytes) {
  const auto found = arrivals.find(barrier);
  expect(found != arrivals.end() && !found->second.expecting && bytes >= 0,
         "bytes expected at a barrier that is not ready, or fewer than none");
  Arrivals& a = arrivals[barrier];
  a.expecting = true;
  a.expected = static_cast<size_t>(std::max(bytes, 0));
}

void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
  arrivals[barrier].loads.push_back(checked_copy(to, from, bytes, 16));
}

void wait_for_bytes(uint64_t* barrier, bool parity) {
  wait_for_block();
  Arrivals& a = arrivals[barrier];
  if (a.expecting) {
    size_t bytes = 0;
    for (const Copy& load : a.loads) bytes += load.bytes;
    expect(bytes == a.expected, "other bytes came than were expected");
    make(a.loads);
    a.expecting = false;
    a.parity = !a.parity;
  }
  expect(parity != a.parity, "a wait for bytes of another phase");
}

void bulk_store(void* to, const void* from, int bytes) {
  bulk_stores[blockIdx.x].push_back(checked_copy(to, from, bytes, 16));
}

void wait_for_bulk_stores() {
  make(bulk_stores[blockIdx.x]);
}

unsigned char* address_of_block(const unsigned char* mine, int rank) {
  const auto offset = mine - dynamic_shared_memory();
  return dynamic_shared[static_cast<size_t>(rank) * block_lines].bytes + offset;
}

unsigned char* dynamic_shared_memory() {
  const size_t block = blocks_of_cluster ? current / blockDim.x : 0;
  return dynamic_shared[block * block_lines].bytes;
}

void wait_for_block() {
  wait(blocks_of_cluster ? barriers_of_blocks[current / blockDim.x] : block_barrier);
}

bool any_of_block(bool mine) {
  *exchange_slot(current) = mine;
  wait_for_block();
  const unsigned threads = blockDim.x * blockDim.y;
  const unsigned first = blocks_of_cluster ? current / threads * threads : 0;
  bool any = false;
  for (unsigned i = 0; i < threads; ++i) any |= *exchange_slot(first + i) != 0;
  wait_for_block();  // before a slot is used again
  return any;
}

void wait_for_warp() {
  wait(warp_barriers[current / kWarp]);
}

unsigned this_thread() {
  return current;
}

unsigned char* exchange_slot(unsigned thread) {
  return fibers[first_fiber + thread]->exchange;
}

}  // namespace cuda_emulator

// For Python: what the next calls of operators emulate, and the seed of the threads' order.
extern "C" __attribute__((visibility("default"))) void configure_cuda_emulator(
    int64_t max_blocks, int64_t largest_narrow_index, uint32_t seed) {
  cuda_emulator::settings = {max_blocks, largest_narrow_index};
  cuda_emulator::random_order.seed(seed);
}

// The shared memory of a block, for images that are kept there; until the next call of the above.
extern "C" __attribute__((visibility("default"))) void configure_emulated_images(
    int64_t image_bytes) {
  cuda_emulator::settings.image_bytes = image_bytes;
}

// The emulated device of online SGD: how many blocks run at a time, the threads of a block, and the
// shared memory that it can ask for.
extern "C" __attribute__((visibility("default"))) void configure_emulated_device(
    int multiprocessors, int block_threads, int64_t shared_bytes) {
  cuda_emulator::device = {multiprocessors, block_threads, shared_bytes};
}
