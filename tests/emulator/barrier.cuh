// The emulator's own csrc/barrier.cuh.
#pragma once
#include "ptx.cuh"

constexpr bool LANE_COPIES = true;
constexpr int FETCHERS = 1;

DEVICE void barrier_init(uint32 barrier, int arrivals) { mbarrier_init(barrier, arrivals); }
DEVICE void barrier_arrive(uint32 barrier) { mbarrier_arrive(barrier); }
DEVICE void barrier_wait(uint32 barrier, uint32 phase) { mbarrier_wait(barrier, phase); }
DEVICE void publish_barriers() { __syncthreads(); }

DEVICE void return_to_copies() {}

DEVICE void fetch(uint32 destination, const uint8* source, uint32 bytes, uint32 barrier) {
  mbarrier_arrive_expecting(barrier, bytes);
  bulk_load(destination, source, bytes, barrier);
}
