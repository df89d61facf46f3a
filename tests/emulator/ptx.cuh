// The emulator's own csrc/ptx.cuh, as far as the emulated kernels use it, over runtime.hpp.
#pragma once

using int8 = signed char;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

#define DEVICE [[maybe_unused]] static inline

constexpr uint32 FULL_WARP = 0xFFFFFFFFu;

DEVICE uint32 shared_address(const void* pointer) { return emulator::shared_offset(pointer); }

DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE const uint8* base(const uint8* address) { return address; }

template <class T>
T& shared_at(uint32 address) {
  if (address % sizeof(T)) emulator::fail("misaligned in shared memory");
  return *reinterpret_cast<T*>(shared_memory + address);
}

DEVICE uint4 load_shared_16(uint32 address) { return shared_at<uint4>(address); }
DEVICE uint2 load_shared_8(uint32 address) { return shared_at<uint2>(address); }
DEVICE uint32 load_shared_4(uint32 address) { return shared_at<uint32>(address); }
DEVICE void store_shared_16(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
  shared_at<uint4>(address) = {a, b, c, d};
}
DEVICE void store_shared_8(uint32 address, uint32 a, uint32 b) { shared_at<uint2>(address) = {a, b}; }
DEVICE void store_shared_4(uint32 address, uint32 a) { shared_at<uint32>(address) = a; }

DEVICE void store_matrices_transposed(uint32 address, const uint32 (&v)[4]) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 8; i++) {
    const uint32 row = __shfl_sync(FULL_WARP, address, i / 2 * 8 + lane % 4 * 2 + i % 2);
    shared_at<uint16>(row + lane / 4 * 2) = v[i / 2] >> i % 2 * 16;
  }
}

// Lands when the thread waits for it; until then its target reads as 0xFF.
DEVICE void copy_async_16(uint32 destination, const void* source, bool valid) {
  static const uint4 zeros = {};
  shared_at<uint4>(destination) = {~0u, ~0u, ~0u, ~0u};
  emulator::current->copies.push_back({destination, valid ? source : &zeros});
}

DEVICE void copy_async_commit() {}

template <int PENDING>
void copy_async_wait() {
  static_assert(PENDING == 0);
  for (const auto& [destination, source] : emulator::current->copies)
    std::memcpy(shared_memory + destination, source, 16);
  emulator::current->copies.clear();
}

DEVICE uint32 round_up(uint32 value, uint32 multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

DEVICE void named_barrier(int id, int threads) {
  emulator::meet(emulator::named_barriers[id], "bar", threads, [] {});
}

DEVICE void mbarrier_init(uint32 barrier, int arrivals) {
  emulator::barrier_at(barrier) = {arrivals, arrivals};
}

DEVICE void mbarrier_init_done() {}

DEVICE void mbarrier_arrive_expecting(uint32 barrier, uint32 bytes) {
  emulator::Barrier& state = emulator::barrier_at(barrier);
  state.bytes += bytes, state.pending--;
  emulator::advance(state);
}

DEVICE void mbarrier_arrive(uint32 barrier) { mbarrier_arrive_expecting(barrier, 0); }

// As on the hardware, a phase is known by its parity alone.
DEVICE void mbarrier_wait(uint32 barrier, uint32 phase) {
  emulator::Barrier& state = emulator::barrier_at(barrier);
  while (state.phase % 2 == phase) {
    state.waiting.push_back(emulator::current);
    emulator::leave();
  }
}

// What others have not stored yet, they may store before the next look.
template <class T>
T look(const void* address) {
  if (++emulator::looks > emulator::MOST_LOOKS) emulator::fail("looks for what never comes");
  emulator::runnable.push_back(emulator::current);
  emulator::leave();
  return *static_cast<const T*>(address);
}

DEVICE uint4 load_relaxed_16(const void* address) { return look<uint4>(address); }
DEVICE uint2 load_relaxed_8(const void* address) { return look<uint2>(address); }
DEVICE void store_relaxed_8(void* address, uint32 a, uint32 b) {
  *static_cast<uint2*>(address) = {a, b};
}

DEVICE uint2 load_acquire_8(const void* address) { return load_relaxed_8(address); }
DEVICE int add_ordered_grid(int* counter, int value) { return atomicAdd(counter, value); }
DEVICE void store_release_8(void* address, uint32 a, uint32 b) { store_relaxed_8(address, a, b); }

// Blocks of a grid run one after the other, and grids as well.
DEVICE void launch_dependents() {}
DEVICE void wait_for_predecessor() {}

#include "copy_engine.cuh"
#include "cluster.cuh"
#include "warpgroup.cuh"
