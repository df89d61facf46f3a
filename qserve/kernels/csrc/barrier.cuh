// Barriers in shared memory, and the copies that arrive at them.
#pragma once
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 900
constexpr bool LANE_COPIES = true;  // whether `fetch` is called by one thread, or by a warp
#else
constexpr bool LANE_COPIES = false;
#endif
constexpr int FETCHERS = LANE_COPIES ? 1 : 32;  // threads whose arrival makes a page complete

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

// Ends the block's initialisation; called by all its threads.
DEVICE void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  mbarrier_init_done();
  fence_for_copy_engine();
#endif
  __syncthreads();
}

// Lets a copy overwrite what this thread has written, once it knows of a later arrival.
DEVICE void return_to_copies() {
#if __CUDA_ARCH__ >= 900
  fence_for_copy_engine();
#endif
}

// Copies global to shared memory; `barrier`, which expects FETCHERS arrivals, completes when all has
// come. What is fetched is read once, so it is the first to leave the L2 cache. On sm_90 this is one
// bulk copy by one thread; before that, each thread of a warp copies 16 bytes at a time.
DEVICE void fetch(uint32 destination, const uint8* source, uint32 bytes, uint32 barrier) {
#if __CUDA_ARCH__ >= 900
  uint64 evict_first;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first));
  mbarrier_arrive_expecting(barrier, bytes);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier), "l"(evict_first)
      : "memory");
#else
  for (int offset = threadIdx.x % 32 * 16; offset < bytes; offset += 32 * 16)
    copy_async_16(destination + offset, source + offset, true);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}
