// W4A8 GEMM for few tokens on Hopper, where streaming the weights is all the time there is: one tile
// of ROWS weight rows x TOKENS tokens per block, K cut over the CLUSTER blocks of a cluster and, in a
// block, dealt out over INTERLEAVE warpgroups per 64 rows. The exact integer sums of all parts are
// added through distributed shared memory, so the result does not depend on the cut.
//
// The weight stream starts before the predecessor of this kernel has ended; only the activations
// wait for it.
#include "epilogue.cuh"
#include "ring_sm90.cuh"
#include "weight_sm90.cuh"

constexpr int SLABS = ROWS / SLAB_ROWS;
constexpr int CONSUMER_WARPS = SLABS * INTERLEAVE * 4;
constexpr int CONSUMER_THREADS = CONSUMER_WARPS * 32;
constexpr int THREADS = CONSUMER_THREADS + 64;
constexpr int TOKEN_STAGE_BYTES = TOKENS * BLOCK;
constexpr int WEIGHT_STAGE_BYTES = SLABS * SLAB_BYTES;
constexpr int RING_BYTES = STAGES * (TOKEN_STAGE_BYTES + WEIGHT_STAGE_BYTES);

// Partial sums, int32 [INTERLEAVE][TOKENS][PITCH], over the drained ring; padded against conflicts.
constexpr int PITCH = ROWS + 4;
constexpr int PART_BYTES = TOKENS * PITCH * 4;
constexpr int SUM_BYTES = INTERLEAVE * PART_BYTES;
constexpr int DATA_BYTES = RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES;

// The last step: every block of the cluster finishes its share of the tokens, four rows a thread.
constexpr int SHARE_TOKENS = TOKENS / CLUSTER;
constexpr int QUADS = ROWS / 4;
constexpr int PASSES = (SHARE_TOKENS * QUADS + CONSUMER_THREADS - 1) / CONSUMER_THREADS;

static_assert(STAGES % INTERLEAVE == 0, "a warpgroup always meets the same stages");
static_assert(CONSUMER_THREADS % QUADS == 0, "a thread keeps its rows in every pass");
static_assert(1024 + DATA_BYTES + BARRIER_BYTES <= SHARED_BYTES, "too little shared memory");

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

// The sums of one slab over every INTERLEAVE-th block of 128 columns. A group of multiplies stays in
// flight while the next is dequantized; the two operand buffers alternate.
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
    packed.load(shared.weights + ring.stage * WEIGHT_STAGE_BYTES + slab * SLAB_BYTES, 0);
  };
  auto release = [&] {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.barriers.empty(read_stage));
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

DEVICE void store_partial_sums(const int (&accumulator)[TOKENS / 2], uint32 part, int slab) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int row = slab * SLAB_ROWS + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    store_shared_4(part + (token * PITCH + row + i % 4 / 2 * 8) * 4, accumulator[i]);
  }
}

DEVICE int4 add_parts(uint32 address) {
  int4 sum = make_int4(0, 0, 0, 0);
#pragma unroll
  for (int part = 0; part < INTERLEAVE; part++)
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) {
      const uint32 own = address + part * PART_BYTES;
      const int4 v = load_peer_16(CLUSTER > 1 ? peer_address(own, rank) : own);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    w4a8_gemm_small(const __grid_constant__ TensorMap token_map, const Operands operands,
                    uint16* output) {
  extern __shared__ uint8 dynamic[];
  const Shared shared(round_up(shared_address(dynamic), 1024));
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int first_row = blockIdx.x / CLUSTER * ROWS, first_token = blockIdx.y * TOKENS;
  const int cut = operands.k_blocks * rank / CLUSTER;
  const Range blocks = {cut, operands.k_blocks * (rank + 1) / CLUSTER - cut};

  launch_dependents();
  if (threadIdx.x == CONSUMER_THREADS) shared.barriers.init(4 * SLABS);
  __syncthreads();

  const int quad = threadIdx.x % QUADS * 4;
  Row rows[4];
  Token tokens[PASSES];
  if (warp >= CONSUMER_WARPS) {
    if (warp == CONSUMER_WARPS && lane == 0)
      stream_weights(operands, shared, first_row / SLAB_ROWS, blocks);
    if (warp == CONSUMER_WARPS + 1 && lane == 0)
      stream_tokens(&token_map, shared, first_token, blocks);
    __syncwarp();
  } else {
    const int warpgroup = warp / 4, slab = warpgroup % SLABS, part = warpgroup / SLABS;
    int accumulator[1][TOKENS / 2];
    wait_for_predecessor();
    accumulate(accumulator, shared, slab, part, blocks.count);
    named_barrier(1, CONSUMER_THREADS);
    store_partial_sums(accumulator[0], shared.tokens + part * PART_BYTES, slab);
    // The epilogue's terms, fetched while the cluster gathers.
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = load_row(operands, first_row + quad + i);
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
      tokens[pass] = load_token(operands, first_token + rank * SHARE_TOKENS +
                                              (pass * CONSUMER_THREADS + threadIdx.x) / QUADS);
    if (CLUSTER == 1) named_barrier(1, CONSUMER_THREADS);
  }
  if (CLUSTER > 1) cluster_sync();

  if (warp < CONSUMER_WARPS && first_row + quad < operands.rows) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int share = (pass * CONSUMER_THREADS + threadIdx.x) / QUADS;
      const int token = rank * SHARE_TOKENS + share;
      if (share >= SHARE_TOKENS || first_token + token >= operands.tokens) break;
      const int4 sum = add_parts(shared.tokens + (token * PITCH + quad) * 4);
      uint2 packed;
      packed.x = pack_outputs(finish(sum.x, rows[0], tokens[pass]), finish(sum.y, rows[1], tokens[pass]));
      packed.y = pack_outputs(finish(sum.z, rows[2], tokens[pass]), finish(sum.w, rows[3], tokens[pass]));
      const int64 row_start = static_cast<int64>(first_token + token) * operands.rows;
      *reinterpret_cast<uint2*>(output + row_start + first_row + quad) = packed;
    }
  }
  // No block ends while another still reads its sums.
  if (CLUSTER > 1) cluster_sync();
}
