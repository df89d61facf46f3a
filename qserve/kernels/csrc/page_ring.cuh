// Pages on their way through shared memory: one warp fetches; page n of a block goes to reader
// n % WARPS, which has the stages n % WARPS, n % WARPS + WARPS and so on, and gives them back.
#pragma once
#include "barrier.cuh"

// A barrier tells one phase from the next only, and copies may overtake one another: a stage's
// successive pages must be one reader's, who waits for each of them.
static_assert(STAGES % WARPS == 0, "a stage belongs to one reader");
static_assert(32 % WARPS == 0, "the fetching warp has lanes for whole rows of pages");

struct RingPosition {
  int stage;
  uint32 phase;

  __device__ __forceinline__ void advance(int pages) {
    stage += pages;
    if (stage >= STAGES) stage -= STAGES, phase ^= 1;
  }
};
