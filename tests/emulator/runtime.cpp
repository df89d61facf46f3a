// What runs blocks: their threads in a random order, and copies as they land. Compiled once for all kernels.
#include "runtime.hpp"

namespace emulator {

void meet(Meeting& meeting, const char* operation, size_t size,
          const std::function<void()>& conclude) {
  if (meeting.arrived.empty()) meeting.operation = operation;
  if (std::strcmp(meeting.operation, operation))
    fail(std::string(operation) + " meets " + meeting.operation);
  meeting.arrived.push_back(current);
  if (meeting.arrived.size() < size) return leave();
  conclude();
  meeting.arrived.pop_back();
  wake(meeting.arrived);
}

Words warp_wide(const char* operation, const Words& operands, const Combine& combine) {
  const unsigned first = current->thread.x / 32 * 32;
  Meeting& warp = warps[first / 32];
  warp.operands[current->thread.x % 32] = operands;
  meet(warp, operation, 32, [&] {
    for (int lane = 0; lane < 32; lane++)
      fibers[first + lane]->result = combine(warp.operands, lane);
  });
  return current->result;
}

static void land(const Copy& copy) {
  std::memcpy(shared_memory + copy.target, copy.source, copy.bytes);
  Barrier& barrier = barriers[copy.barrier];
  barrier.bytes -= copy.bytes;
  advance(barrier);
}

static void land_due_copies() {
  const auto late = std::stable_partition(copies.begin(), copies.end(),
                                          [](const Copy& copy) { return copy.due <= now; });
  std::vector<Copy> landing(copies.begin(), late);
  copies.erase(copies.begin(), late);
  for (const Copy& copy : landing) land(copy);
}

static void run_next() {
  std::swap(runnable[random() % runnable.size()], runnable.back());
  current = runnable.back();
  runnable.pop_back();
  swapcontext(&scheduler, &current->context);
}

static void start() {
  kernel();
  finished++;
  leave();
}

static void create_fiber(unsigned thread) {
  if (fibers.size() <= thread) fibers.push_back(std::make_unique<Fiber>());
  Fiber* fiber = fibers[thread].get();
  fiber->thread = {thread, 0, 0}, fiber->arrivals = 0, fiber->copies = {};
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.data();
  fiber->context.uc_stack.ss_size = fiber->stack.size();
  makecontext(&fiber->context, start, 0);
  runnable.push_back(fiber);
}

static void run_block(int threads) {
  warps = {}, warpgroups = {}, multiplies = {}, named_barriers = {}, block = {};
  finished = 0, looks = 0, block_threads = threads;
  runnable.clear(), copies.clear(), barriers.clear();
  std::memset(shared_memory, 0xFF, SHARED_LIMIT);
  for (int thread = 0; thread < threads; thread++) create_fiber(thread);
  while (finished < threads && error.empty() && !failed) {
    now++;
    run_errands();
    land_due_copies();
    if (!runnable.empty()) {
      run_next();
    } else if (copies.empty() && may_get_errands()) {
      std::this_thread::yield();
    } else if (copies.empty()) {
      error = "deadlock: " + std::to_string(threads - finished) + " threads wait";
    } else {
      now = std::min_element(copies.begin(), copies.end(), [](const Copy& a, const Copy& b) {
              return a.due < b.due;
            })->due;
    }
  }
  if (error.empty() && !failed && !copies.empty()) error = "copies outlive the block";
}

static std::mutex reporting;
static std::string report;

static void run_block_of_grid(Index where, int threads, unsigned seed) {
  const unsigned index = where.x + gridDim.x * (where.y + gridDim.y * where.z);
  blockIdx = where, error.clear();
  random.seed(seed + index);
  begin_block(index, shared_memory);
  run_block(threads);
  if (!end_block() && error.empty() && !failed) error = "a peer writes to a block that ends";
  if (error.empty()) return;
  const std::lock_guard lock(reporting);
  if (!failed.exchange(true)) report = error;
}

}  // namespace emulator

const char* run_grid(Index grid, int threads, unsigned cluster, unsigned seed, int longest_copy,
                     bool side_by_side, const std::function<void()>& kernel) {
  emulator::kernel = kernel, emulator::longest_copy = longest_copy, emulator::failed = false;
  emulator::cluster_size = cluster;
  emulator::blocks = std::vector<emulator::Block>(grid.x * grid.y * grid.z);
  gridDim = grid;
  std::vector<std::thread> running;
  const auto join = [&] {
    for (std::thread& block : running) block.join();
    running.clear();
  };
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x && !emulator::failed; x++)
        if (side_by_side || cluster > 1) {
          running.emplace_back(emulator::run_block_of_grid, Index{x, y, z}, threads, seed);
          if (!side_by_side && running.size() == cluster) join();
        } else {
          emulator::run_block_of_grid({x, y, z}, threads, seed);
        }
  join();
  return emulator::failed ? emulator::report.c_str() : nullptr;
}
