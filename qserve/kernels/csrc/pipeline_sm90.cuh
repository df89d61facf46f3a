// The ring of stages between the threads that stream operands in and the warps that multiply, and
// the multiply itself.
#pragma once
#include "weight.cuh"

// The consumers read a stage, wait for the next, and only then release the one before it.
static_assert(STAGES >= 3 * INTERLEAVE, "fewer stages would deadlock");
static_assert(STAGES % INTERLEAVE == 0, "a warpgroup always meets the same stages");

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

// This thread's share of a slab in shared memory, for a warpgroup that multiplies all of its rows.
template <int HALVES>
DEVICE void load_fragment(PackedFragment<HALVES>& packed, uint32 slab, int first_half) {
  const int thread = threadIdx.x % 128, row_pair = thread / 32 * 8 + thread % 32 / 4;
  packed.load(slab + thread * 16, LOAD_BYTES, slab + CODE_BYTES + row_pair * 4, GROUP_BYTES,
              first_half);
}

// Opens a batch of multiplies. The empty statement keeps the compiler from computing an operand
// after the fence, which would make it serialise them.
template <int SLABS, int WORDS>
DEVICE void open_multiplies(uint32 (&operand)[SLABS][WORDS]) {
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
    for (int i = 0; i < WORDS; i++) asm volatile("" : "+r"(operand[slab][i])::"memory");
  wgmma_fence();
}

// accumulator[slab] (+)= operand[slab] x the tokens at `tokens`, as one group in flight.
template <int SLABS, int WORDS>
DEVICE void multiply(int (&accumulator)[SLABS][TOKENS / 2], uint32 (&operand)[SLABS][WORDS],
                     uint64 tokens, bool accumulate) {
  open_multiplies(operand);
#pragma unroll
  for (int i = 0; i < WORDS; i += 4)
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
      wgmma(accumulator[slab], operand[slab][i], operand[slab][i + 1], operand[slab][i + 2],
            operand[slab][i + 3], tokens + i / 2, accumulate || i > 0);
  wgmma_commit();
}
