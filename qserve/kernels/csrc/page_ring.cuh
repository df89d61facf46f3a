// Pages on their way through shared memory: one warp fetches; page n of a block goes to reader
// n % WARPS, which has the stages n % WARPS, n % WARPS + WARPS and so on, and gives them back.
#pragma once
#include "barrier.cuh"

// A barrier tells one phase from the next only, and copies may overtake one another: a stage's
// successive pages must be one reader's, who waits for each of them.
static_assert(STAGES % WARPS == 0, "a stage belongs to one reader");

// The fetching warp has a lane for each reader, and the ids of whole rows of pages at a time.
constexpr int PAGES_AHEAD = 32 / WARPS * WARPS;

struct RingPosition {
  int stage;
  uint32 phase;

  __device__ __forceinline__ void advance(int pages) {
    stage += pages;
    if (stage >= STAGES) stage -= STAGES, phase ^= 1;
  }
  // At most STAGES pages before; a barrier that has not been used yet lets pass who waits for those.
  __device__ __forceinline__ RingPosition before(int pages) const {
    if (stage >= pages) return {stage - pages, phase};
    return {stage - pages + STAGES, phase ^ 1};
  }
};
