// The ring of stages between the threads that stream operands in and the warps that multiply.
#pragma once
#include "ptx.cuh"

struct Ring {
  int stage = 0;
  uint32 phase = 0;

  __device__ __forceinline__ void advance(int stages = 1) {
    stage += stages;
    if (stage >= STAGES) {
      stage -= STAGES;
      phase ^= 1;
    }
  }
};

// Two barriers a stage: full, when both operands have arrived, and empty, when all have read them.
struct Barriers {
  uint32 base;

  __device__ __forceinline__ uint32 full(int stage) const { return base + stage * 16; }
  __device__ __forceinline__ uint32 empty(int stage) const { return base + stage * 16 + 8; }

  __device__ __forceinline__ void init(int readers) const {
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(full(stage), 2);  // the thread of the weights, the thread of the tokens
      mbarrier_init(empty(stage), readers);
    }
    mbarrier_init_done();
  }
  // Waits until a stage may be written, then announces `bytes` of it.
  __device__ __forceinline__ void acquire(const Ring& ring, uint32 bytes) const {
    mbarrier_wait(empty(ring.stage), ring.phase ^ 1);
    mbarrier_arrive_expecting(full(ring.stage), bytes);
  }
  __device__ __forceinline__ void wait_full(const Ring& ring) const {
    mbarrier_wait(full(ring.stage), ring.phase);
  }
};

constexpr int BARRIER_BYTES = STAGES * 16;
