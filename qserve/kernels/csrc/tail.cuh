// What follows a GEMM and needs whole rows of its output, in the same launch: residual add, RMSNorm
// and quantization. The blocks that finish their tiles last wait for each other, then share out the
// rows.
//
// All other blocks end at once. Fewer blocks wait than the GPU has multiprocessors, so those they
// wait for always find a place to run, whatever else is running.
#pragma once
#include "rows.cuh"

static_assert(THREADS <= FINISHING_THREADS, "a row takes more threads than a block has");

// `counters` are zero between launches: blocks that have finished, waiters that need them no more.
struct Meeting {
  uint32* counters;
  int waiters;

  __device__ __forceinline__ int blocks() const { return gridDim.x * gridDim.y; }
};

DEVICE uint32 count(uint32* counter) {
  uint32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

DEVICE uint32 load_acquire(const uint32* address) {
  uint32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// This block's tile is stored. Its place among the blocks that wait, or a negative number.
DEVICE int take_place(const Meeting& meeting) {
  __shared__ int place;
  named_barrier(1, FINISHING_THREADS);
  if (threadIdx.x == 0)
    place = static_cast<int>(count(meeting.counters)) - (meeting.blocks() - meeting.waiters);
  named_barrier(1, FINISHING_THREADS);
  return place;
}

// Whoever comes last knows that all have come.
DEVICE void wait_for_all(const Meeting& meeting, int place) {
  if (place == meeting.waiters - 1) return;
  if (threadIdx.x == 0)
    while (load_acquire(meeting.counters) < meeting.blocks()) {
    }
  named_barrier(0, THREADS);
}

// The last to leave makes ready for the next launch.
DEVICE void leave(const Meeting& meeting) {
  if (threadIdx.x == 0 && count(meeting.counters + 1) + 1 == meeting.waiters)
    meeting.counters[0] = 0, meeting.counters[1] = 0;
}

// Called by the threads that have stored the tile; there are at least as many rows as waiters.
DEVICE void finish_rows(const Norm& norm, const Quantized& out, const uint16* x, int rows,
                        const Meeting& meeting) {
  const int place = take_place(meeting);
  if (place < 0 || threadIdx.x >= THREADS) return;
  NormRow norm_row(norm);
  norm_row.fetch(place);
  wait_for_all(meeting, place);
  for (int row = place; row < rows; row += meeting.waiters) {
    if (row != place) norm_row.fetch(row);
    Values values;
    norm_row.normalize(values, x, row);
    quantize_row(values, out, row);
  }
  leave(meeting);
}
