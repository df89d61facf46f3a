// The emulator's own csrc/barrier.cuh.
#pragma once
#include "ptx.cuh"

constexpr bool LANE_COPIES = true;
constexpr int FETCHERS = 1;

DEVICE void barrier_init(uint32 barrier, int arrivals) {
  emulator::barrier_at(barrier) = {arrivals, arrivals};
}

DEVICE void barrier_arrive(uint32 barrier) {
  emulator::Barrier& state = emulator::barrier_at(barrier);
  state.pending--;
  emulator::advance(state);
}

// As on the hardware, a phase is known by its parity alone.
DEVICE void barrier_wait(uint32 barrier, uint32 phase) {
  emulator::Barrier& state = emulator::barrier_at(barrier);
  while (state.phase % 2 == phase) {
    state.waiting.push_back(emulator::current);
    emulator::leave();
  }
}

DEVICE void publish_barriers() { __syncthreads(); }

DEVICE void return_to_copies() {}

DEVICE void fetch(uint32 destination, const uint8* source, uint32 bytes, uint32 barrier) {
  if (destination % 16 || bytes % 16) emulator::fail("misaligned copy");
  emulator::Barrier& state = emulator::barrier_at(barrier);
  state.bytes += bytes, state.pending--;
  if (state.pending < 0) emulator::fail("a stage is filled twice");
  std::memset(shared_memory + destination, 0xFF, bytes);
  const long due = emulator::now + emulator::random() % emulator::longest_copy;
  emulator::copies.push_back({destination, source, bytes, barrier, due});
}
