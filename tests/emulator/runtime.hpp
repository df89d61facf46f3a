// CUDA's execution model on one CPU thread, for kernels that are to be tested without a GPU.
//
// The threads of a block are fibers, which run in a random order and change at every operation that
// waits. Blocks, or clusters of blocks, run one after the other, or all in threads of the CPU. Warp-wide
// operations wait for all 32 lanes. Copies to shared memory land late and in any order; until then their
// target reads as 0xFF. A deadlock, looks for what never comes, lanes that meet in different operations and
// barriers that are misused end the launch with a message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "cluster.hpp"

#define __device__
#define __global__
#define __shared__ thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH__ 900
#define threadIdx (emulator::current->thread)

struct Index {
  unsigned x, y, z;
};
struct float2 {
  float x, y;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local Index blockIdx;
inline Index gridDim;
inline constexpr size_t SHARED_LIMIT = 232448;
alignas(1024) inline thread_local unsigned char shared_memory[SHARED_LIMIT];

namespace emulator {

using Words =
    std::array<unsigned, 10>;  // what a lane brings to a warp-wide operation, or takes away
using Lanes = std::array<Words, 32>;

struct Fiber {
  Index thread;
  unsigned arrivals = 0;  // at the barrier of its cluster
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Words result;
  std::vector<std::pair<unsigned, const void*>> copies = {};  // its own, under way
};

struct Meeting {  // of a warp's lanes, or of a block's threads
  const char* operation = nullptr;
  std::vector<Fiber*> arrived;
  Lanes operands;
};

struct Barrier {
  int expected = 0, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
  std::vector<Fiber*> waiting;
};

struct Copy {
  unsigned target;
  const unsigned char* source;
  unsigned bytes, barrier;
  long due;
};

struct Multiplies {  // of a warpgroup, by groups that were committed, and of the group to come
  std::deque<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
};

inline constexpr long MOST_LOOKS = 5'000'000;  // of a block; some seconds', where tenths of one are enough

// Of the grid.
inline std::function<void()> kernel;
inline int longest_copy;
inline std::atomic<bool> failed;

// Of a block, which runs in a thread of the CPU.
inline thread_local Fiber* current;
inline thread_local ucontext_t scheduler;
inline thread_local std::vector<std::unique_ptr<Fiber>> fibers;
inline thread_local std::vector<Fiber*> runnable;
inline thread_local std::array<Meeting, 32> warps;
inline thread_local std::array<Meeting, 8> warpgroups;
inline thread_local std::array<Multiplies, 8> multiplies;
inline thread_local std::array<Meeting, 16> named_barriers;
inline thread_local Meeting block;
inline thread_local std::map<unsigned, Barrier> barriers;
inline thread_local std::vector<Copy> copies;
inline thread_local std::mt19937 random;
inline thread_local std::string error;
inline thread_local long now, looks;  // steps, and of these those at what other blocks store
inline thread_local int finished, block_threads;

inline void leave() { swapcontext(&current->context, &scheduler); }

[[noreturn]] inline void fail(const std::string& message) {
  error = message + " (thread " + std::to_string(current->thread.x) + ")";
  while (true) leave();
}

inline void wake(std::vector<Fiber*>& sleepers) {
  runnable.insert(runnable.end(), sleepers.begin(), sleepers.end());
  sleepers.clear();
}

// Waits for `size` threads; the last to come does `conclude`, then all go on.
void meet(Meeting& meeting, const char* operation, size_t size,
          const std::function<void()>& conclude);

using Combine = std::function<Words(const Lanes&, int lane)>;

Words warp_wide(const char* operation, const Words& operands, const Combine& combine);

template <class T>
unsigned to_word(T value) {
  static_assert(sizeof(T) == 4);
  unsigned word;
  std::memcpy(&word, &value, 4);
  return word;
}

template <class T>
T from_word(unsigned word) {
  T value;
  std::memcpy(&value, &word, 4);
  return value;
}

template <class T>
T shuffle(const char* operation, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Words operands = {source};
  std::memcpy(&operands[1], &value, sizeof(T));
  const Words result = warp_wide(operation, operands, [](const Lanes& lanes, int lane) {
    return lanes[lanes[lane][0] % 32];
  });
  std::memcpy(&value, &result[1], sizeof(T));
  return value;
}

inline unsigned shared_offset(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - shared_memory;
  if (offset < 0 || offset >= static_cast<long>(SHARED_LIMIT)) fail("not in shared memory");
  return offset;
}

inline Barrier& barrier_at(unsigned address) {
  if (address % 8) fail("misaligned barrier");
  return barriers[address];
}

inline void advance(Barrier& barrier) {
  if (barrier.pending < 0) error = "a barrier got more arrivals than it expects";
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++, barrier.pending = barrier.expected;
  wake(barrier.waiting);
}

}  // namespace emulator

// Runs every block of a grid, one cluster after the other or all at the same time; returns what went
// wrong, or null.
const char* run_grid(Index grid, int threads, unsigned cluster, unsigned seed, int longest_copy,
                     bool side_by_side, const std::function<void()>& kernel);

// A call of `kernel` with the parameters that `table` points to.
template <class... Parameters>
std::function<void()> bind(void (*kernel)(Parameters...), const void* const* table) {
  const auto call = [=]<size_t... I>(std::index_sequence<I...>) {
    std::tuple<std::remove_const_t<Parameters>...> values;
    (std::memcpy(&std::get<I>(values), table[I], sizeof(std::get<I>(values))), ...);
    kernel(std::get<I>(values)...);
  };
  return [=] { call(std::index_sequence_for<Parameters...>()); };
}

// ---- CUDA's built-in functions ---------------------------------------------------------------

using std::max;
using std::min;

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned word) { return emulator::from_word<float>(word); }
inline unsigned __float_as_uint(float value) { return emulator::to_word(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline float __double2float_rn(double a) { return a; }
inline float __int2float_rn(int a) { return a; }
inline float __frsqrt_rn(float a) { return 1.0 / std::sqrt(static_cast<double>(a)); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline int __float2int_rn(float a) { return std::isnan(a) ? 0 : std::nearbyint(a); }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++)
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return result;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8)
    sum += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
  return sum;
}

inline int __reduce_add_sync(unsigned, int value) {
  return emulator::warp_wide("redux.add", {static_cast<unsigned>(value)},
                             [](const emulator::Lanes& lanes, int) {
                               emulator::Words sum = {};
                               for (const emulator::Words& lane : lanes) sum[0] += lane[0];
                               return sum;
                             })[0];
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulator::warp_wide("redux.max", {value}, [](const emulator::Lanes& lanes, int) {
    return *std::max_element(lanes.begin(), lanes.end());
  })[0];
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref(*address).fetch_add(value);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle("shfl.bfly", value, threadIdx.x % 32 ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle("shfl.idx", value, source);
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::shuffle("shfl.up", value, lane < delta ? lane : lane - delta);
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  return emulator::warp_wide("vote", {predicate}, [](const emulator::Lanes& lanes, int) {
    emulator::Words ballot = {};
    for (int lane = 0; lane < 32; lane++) ballot[0] |= lanes[lane][0] << lane;
    return ballot;
  })[0];
}

inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate); }

inline void __syncwarp() {
  emulator::warp_wide("syncwarp", {},
                      [](const emulator::Lanes&, int) { return emulator::Words{}; });
}

inline void __syncthreads() {
  using emulator::block, emulator::block_threads;
  emulator::meet(block, "syncthreads", block_threads, [] {});
}
