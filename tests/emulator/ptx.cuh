// The emulator's own csrc/ptx.cuh, as far as the emulated kernels use it.
#pragma once
#include "runtime.hpp"

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

DEVICE uint4 load_shared_16(uint32 address) {
  if (address % 16) emulator::fail("misaligned load");
  return *reinterpret_cast<const uint4*>(shared_memory + address);
}

DEVICE void store_shared_16(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
  if (address % 16) emulator::fail("misaligned store");
  *reinterpret_cast<uint4*>(shared_memory + address) = {a, b, c, d};
}

DEVICE uint32 round_up(uint32 value, uint32 multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Of whole blocks only.
DEVICE void named_barrier(int, int) { __syncthreads(); }

// Blocks of a grid run one after the other, and grids as well.
DEVICE void launch_dependents() {}
DEVICE void wait_for_predecessor() {}

// ---- warpgroup matrix multiply: done at once, when all threads of the warpgroup have come -----------

DEVICE uint64 wgmma_descriptor(uint32 address) { return (address & 0x3FFFF) >> 4; }

// Element k of row n of an operand in shared memory.
DEVICE float element_of(uint64 descriptor, int n, int k) {
  const uint32 address = (descriptor << 4) + n / 8 * 1024 + n % 8 * 128 + k * 2;
  _Float16 value;
  std::memcpy(&value, shared_memory + (address ^ address >> 3 & 0x70), 2);
  return value;
}

// Element k of a row that lies in four threads' registers as the multiply's first operand.
DEVICE float element_of(const emulator::Multiply* row, int half, int k) {
  _Float16 value;
  const uint32* pair = &row[k % 8 / 2].a[half + k / 8 * 2];
  std::memcpy(&value, reinterpret_cast<const uint16*>(pair) + k % 2, 2);
  return value;
}

template <int N>
void wgmma(float (&d)[N], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint64 b, bool accumulate) {
  const unsigned thread = threadIdx.x % 128, first = threadIdx.x - thread;
  emulator::multiplies[threadIdx.x] = {d, {a0, a1, a2, a3}};
  emulator::meet(emulator::warpgroups[threadIdx.x / 128], "wgmma", 128, [&] {
    for (int lane = 0; lane < 128; lane++)
      for (int i = 0; i < N; i++) {
        const emulator::Multiply* row = &emulator::multiplies[first + lane / 4 * 4];
        float* sum = emulator::multiplies[first + lane].d + i;
        double product = 0;
        for (int k = 0; k < 16; k++)
          product += double(element_of(row, i / 2 % 2, k)) *
                     element_of(b, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
        *sum = accumulate ? *sum + product : product;
      }
  });
}

template <int N>
void pin(const uint32 (&)[N]) {}
template <int N>
void pin(const float (&)[N]) {}
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
template <int PENDING>
void wgmma_wait() {}
template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void give_registers() {}
DEVICE void fence_for_copy_engine() {}
