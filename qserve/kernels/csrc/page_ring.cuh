// Pages on their way through shared memory. One warp fetches; page n of a block goes to stage
// n % STAGES and to reader n % WARPS, which gives the stage back. On sm_90 a page is one bulk copy
// by one thread; before that, the warp's threads copy 16 bytes at a time.
#pragma once
#include "kv_page.cuh"

// A barrier tells one phase from the next only, and copies may overtake one another: a stage's
// successive pages must be one reader's, who waits for each of them.
static_assert(STAGES % WARPS == 0, "a stage belongs to one reader");

#if __CUDA_ARCH__ >= 900
constexpr int FETCHERS = 1;  // threads whose arrival makes a page complete
#else
constexpr int FETCHERS = 32;
#endif

struct RingPosition {
  int stage;
  uint32 phase;

  __device__ __forceinline__ void advance(int pages) {
    stage += pages;
    if (stage >= STAGES) stage -= STAGES, phase ^= 1;
  }
};

// Returns once the barrier's phase of this parity is complete.
DEVICE void barrier_wait(uint32 barrier, uint32 phase) {
#if __CUDA_ARCH__ >= 900
  mbarrier_wait(barrier, phase);
#else
  asm volatile(
      "{\n.reg .pred done;\n"
      "retry: mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra retry;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
#endif
}

DEVICE void barrier_arrive(uint32 barrier) {
  asm volatile("{.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier)
               : "memory");
}

DEVICE void barrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Called by a whole warp; `barrier` completes when the block has arrived. Pages are read once, so
// they are the first to leave the L2 cache.
DEVICE void fetch_block(uint32 destination, const uint8* source, uint32 barrier) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 != 0) return;
  uint64 evict_first;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first));
  mbarrier_arrive_expecting(barrier, BLOCK_BYTES);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(destination),
      "l"(source), "r"(BLOCK_BYTES), "r"(barrier), "l"(evict_first)
      : "memory");
#else
  for (int offset = threadIdx.x % 32 * 16; offset < BLOCK_BYTES; offset += 32 * 16)
    copy_async_16(destination + offset, source + offset, true);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}
