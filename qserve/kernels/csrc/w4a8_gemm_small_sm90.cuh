// W4A8 GEMM for few tokens on Hopper, where streaming the weights is all the time there is: one
// tile of ROWS weight rows x TOKENS tokens per block, K cut over the CLUSTER blocks of a cluster
// and, in a block, dealt out over INTERLEAVE warpgroups per 64 rows. The exact integer sums of all
// parts are added through distributed shared memory, so the result does not depend on the cut.
//
// The weight stream starts before the predecessor of this kernel has ended; only the activations
// wait for it.
#pragma once
#include "pipeline_sm90.cuh"

constexpr int SLABS = ROWS / SLAB_ROWS;
constexpr int CONSUMER_WARPS = SLABS * INTERLEAVE * 4;
constexpr int CONSUMER_THREADS = CONSUMER_WARPS * 32;
constexpr int FINISHING_THREADS = CONSUMER_THREADS;
constexpr int BLOCK_THREADS = CONSUMER_THREADS + 64;
#include "sums.cuh"

constexpr int TOKEN_STAGE_BYTES = TOKENS * BLOCK;
constexpr int WEIGHT_STAGE_BYTES = SLABS * SLAB_BYTES;
constexpr int RING_BYTES = STAGES * (TOKEN_STAGE_BYTES + WEIGHT_STAGE_BYTES);
constexpr int DATA_BYTES = RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES;  // sums follow the ring
static_assert(1024 + DATA_BYTES + BARRIER_BYTES <= SHARED_BYTES, "too little shared memory");

extern __shared__ uint8 shared_memory[];

struct Shared {
  uint32 tokens, weights;
  Barriers barriers;

  __device__ __forceinline__ explicit Shared(uint32 base) {
    tokens = base;
    weights = tokens + STAGES * TOKEN_STAGE_BYTES;
    barriers.base = base + round_up(DATA_BYTES, 16);
  }
};

struct Range {
  int first, count;
};

DEVICE void stream_weights(const Operands& operands, const Shared& shared, int slab, Range blocks) {
  // Half a pair of slabs is one copy per stage, whole pairs are contiguous.
  constexpr int copies = SLABS > 1 ? SLABS / 2 : 1, bytes = WEIGHT_STAGE_BYTES / copies;
  Ring ring;
  for (int i = 0; i < blocks.count; i++, ring.advance()) {
    const uint32 stage = shared.weights + ring.stage * WEIGHT_STAGE_BYTES;
    shared.barriers.acquire(ring, WEIGHT_STAGE_BYTES);
#pragma unroll
    for (int copy = 0; copy < copies; copy++)
      bulk_load(stage + copy * bytes,
                slab_address(operands.weight, slab + copy * 2, blocks.first + i, operands.k_blocks),
                bytes, shared.barriers.full(ring.stage));
  }
}

DEVICE void stream_tokens(const TensorMap* map, const Shared& shared, int token, Range blocks) {
  wait_for_predecessor();
  Ring ring;
  for (int i = 0; i < blocks.count; i++, ring.advance()) {
    shared.barriers.acquire(ring, TOKEN_STAGE_BYTES);
    tensor_load(shared.tokens + ring.stage * TOKEN_STAGE_BYTES, map, (blocks.first + i) * BLOCK,
                token, shared.barriers.full(ring.stage));
  }
}

// The sums of one slab over every INTERLEAVE-th block of 128 columns. A group of multiplies stays
// in flight while the next is dequantized; the two operand buffers alternate.
DEVICE void accumulate(int (&accumulator)[1][TOKENS / 2], const Shared& shared, int slab, int part,
                       int blocks) {
  uint32 even[1][16], odd[1][16];
  PackedFragment<2> packed;
  Ring ring;
  ring.stage = part;
  int remaining = (blocks - part + INTERLEAVE - 1) / INTERLEAVE, read_stage = -1;
  bool started = false;

  auto load = [&] {
    shared.barriers.wait_full(ring);
    load_fragment(packed, shared.weights + ring.stage * WEIGHT_STAGE_BYTES + slab * SLAB_BYTES, 0);
  };
  auto release = [&] {
    __syncwarp();  // one lane arrives for all, once all have read
    if (threadIdx.x % 32 < ARRIVING_LANES) mbarrier_arrive(shared.barriers.empty(read_stage));
  };
  auto step = [&](uint32(&operand)[1][16]) {
    dequantize(packed, operand[0]);
    const int stage = ring.stage;
    multiply(accumulator, operand, wgmma_descriptor(shared.tokens + stage * TOKEN_STAGE_BYTES),
             started);
    started = true;
    ring.advance(INTERLEAVE);
    if (--remaining > 0) load();
    wgmma_wait<1>();
    if (read_stage >= 0) release();
    read_stage = stage;
    return remaining > 0;
  };

  if (remaining <= 0) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) accumulator[0][i] = 0;
    return;
  }
  load();
#pragma unroll 1
  while (step(even) && step(odd)) {
  }
  wgmma_wait<0>();
}

// All of a kernel but its end: `await_peers`.
DEVICE void multiply_tile(const TensorMap* token_map, const Operands& operands, uint16* output) {
  const Shared shared(round_up(shared_address(shared_memory), 1024));
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int first_row = blockIdx.x / CLUSTER * ROWS, first_token = blockIdx.y * TOKENS;
  const int cut = operands.k_blocks * rank / CLUSTER;
  const Range blocks = {cut, operands.k_blocks * (rank + 1) / CLUSTER - cut};

  launch_dependents();
  if (threadIdx.x == CONSUMER_THREADS) shared.barriers.init(4 * SLABS * ARRIVING_LANES);
  __syncthreads();

  Finish finish{first_token, first_row, rank * SHARE_TOKENS};
  if (warp >= CONSUMER_WARPS) {
    if (warp == CONSUMER_WARPS && lane == 0)
      stream_weights(operands, shared, first_row / SLAB_ROWS, blocks);
    if (warp == CONSUMER_WARPS + 1 && lane == 0)
      stream_tokens(token_map, shared, first_token, blocks);
    __syncwarp();
  } else {
    const int warpgroup = warp / 4, slab = warpgroup % SLABS, part = warpgroup / SLABS;
    int accumulator[1][TOKENS / 2];
    wait_for_predecessor();
    accumulate(accumulator, shared, slab, part, blocks.count);
    named_barrier(1, CONSUMER_THREADS);
    store_partial_sums(accumulator[0], shared.tokens + part * PART_BYTES,
                       slab * SLAB_ROWS + warp % 4 * 16);
    finish.load_terms(operands);  // while the cluster gathers
    if (CLUSTER == 1) named_barrier(1, CONSUMER_THREADS);
  }
  if (CLUSTER > 1) cluster_sync();
  if (warp < CONSUMER_WARPS) finish.store(operands, shared.tokens, output);
  if (CLUSTER > 1) cluster_arrive();
}

// No block ends while another still reads its sums.
DEVICE void await_peers() {
  if (CLUSTER == 1) return;
  __syncwarp();
  cluster_wait();
}
