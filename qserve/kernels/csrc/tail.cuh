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
};

DEVICE uint32 load_acquire(const uint32* address) {
  uint32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// This block's tile is stored. Its place among the blocks that wait, or a negative number.
DEVICE int take_place(const Meeting& meeting) {
  __shared__ int place;
  named_barrier(1, FINISHING_THREADS);
  if (threadIdx.x == 0) {
    const int blocks = gridDim.x * gridDim.y;
    __threadfence();
    place = static_cast<int>(atomicAdd(meeting.counters, 1)) - (blocks - meeting.waiters);
  }
  named_barrier(1, FINISHING_THREADS);
  return place;
}

DEVICE void wait_for_all(const Meeting& meeting) {
  if (threadIdx.x == 0)
    while (load_acquire(meeting.counters) < gridDim.x * gridDim.y) {
    }
  named_barrier(0, THREADS);
}

// The last to leave makes ready for the next launch.
DEVICE void leave(const Meeting& meeting) {
  if (threadIdx.x != 0) return;
  if (atomicAdd(meeting.counters + 1, 1) + 1 == meeting.waiters)
    meeting.counters[0] = 0, meeting.counters[1] = 0;
}

// Called by the threads that have stored the tile; there are at least as many rows as waiters.
DEVICE void finish_rows(const Norm& norm, const Quantized& out, const uint16* x, int rows,
                        const Meeting& meeting) {
  int row = take_place(meeting);
  if (row < 0 || threadIdx.x >= THREADS) return;
  NormRow norm_row(norm);
  norm_row.fetch(row);
  wait_for_all(meeting);
  for (; row < rows; row += meeting.waiters) {
    Values values;
    norm_row.normalize(values, x, row);
    quantize_row(values, out, row);
    if (row + meeting.waiters < rows) norm_row.fetch(row + meeting.waiters);
  }
  leave(meeting);
}
