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

// Of whole blocks only.
DEVICE void named_barrier(int, int) { __syncthreads(); }

// Blocks of a grid run one after the other, and grids as well.
DEVICE void launch_dependents() {}
DEVICE void wait_for_predecessor() {}
