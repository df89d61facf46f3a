// W4A8 GEMM for many tokens on Hopper: persistent, one block per multiprocessor, tiles of ROWS
// weight rows x TOKENS tokens. Two warpgroups multiply; in a third, one thread streams weights and
// one streams activations through a ring of stages of 128 columns. A cluster's two blocks take
// neighbouring row tiles and share the activations by multicast.
//
// Tiles that would leave the last wave more than half empty are split along K instead, over the two
// blocks of a cluster, which add their exact integer sums.
//
// TILE_GROUP: token tiles visited before the next row tile.
#pragma once
#include "epilogue.cuh"
#include "pipeline_sm90.cuh"

constexpr int SLABS = ROWS / 128;                // slabs of each consuming warpgroup
constexpr int HALVES = SLABS == 1 ? 2 : 1;       // halves of a stage in one group of multiplies
constexpr int GROUPS_PER_STAGE = 2 / HALVES;
constexpr int CONSUMER_THREADS = 256;
constexpr int CONSUMER_WARPS = CONSUMER_THREADS / 32;
constexpr int BLOCK_THREADS = CONSUMER_THREADS + 128;
constexpr int CHUNK_TOKENS = 64;                 // tokens of one staged store
constexpr int CHUNKS = TOKENS / CHUNK_TOKENS;
constexpr int STAGING_BUFFERS = 3;

constexpr int TOKEN_STAGE_BYTES = TOKENS * BLOCK;
constexpr int WEIGHT_STAGE_BYTES = ROWS / SLAB_ROWS * SLAB_BYTES;
constexpr int STAGING_BYTES = CHUNK_TOKENS * SLAB_ROWS * 2;

extern __shared__ uint8 shared_memory[];

struct Shared {
  uint32 tokens, staging, weights, terms;
  Barriers barriers;

  __device__ __forceinline__ explicit Shared(uint32 base) {
    tokens = base;
    staging = tokens + STAGES * TOKEN_STAGE_BYTES;
    weights = staging + 2 * STAGING_BUFFERS * STAGING_BYTES;
    terms = weights + STAGES * WEIGHT_STAGE_BYTES;
    barriers.base = terms + 2 * TOKENS * sizeof(Token);
  }
};
constexpr int USED_BYTES = 1024 + STAGES * (TOKEN_STAGE_BYTES + WEIGHT_STAGE_BYTES) +
                           2 * STAGING_BUFFERS * STAGING_BYTES + 2 * TOKENS * sizeof(Token) +
                           BARRIER_BYTES;
static_assert(USED_BYTES <= SHARED_BYTES, "the launch gives too little shared memory");

struct Tile {
  int token, slab;           // first token, first slab
  int first_block, blocks;   // along K
  bool split;                // half of K; the cluster's other block has the rest
};

// Hands this block its tiles: whole ones in cluster-sized strides, then perhaps half of one.
class TileQueue {
 public:
  __device__ __forceinline__ TileQueue(const Operands& operands, int whole_tiles)
      : blocks_(operands.k_blocks), whole_tiles_(whole_tiles) {
    rank_ = CLUSTER > 1 ? cluster_rank() : 0;
    next_ = cluster_ = blockIdx.x / CLUSTER;
    token_tiles_ = (operands.tokens + TOKENS - 1) / TOKENS;
    row_tiles_ = (operands.rows + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
    has_split_ = cluster_ < 2 * (token_tiles_ * row_tiles_ - whole_tiles_);
  }

  __device__ __forceinline__ bool has_split() const { return CLUSTER == 2 && has_split_; }

  __device__ __forceinline__ bool pop(Tile& tile) {
    if (next_ < whole_tiles_) {
      place(tile, next_, rank_);
      tile.first_block = 0, tile.blocks = blocks_, tile.split = false;
      next_ += gridDim.x / CLUSTER;
      return true;
    }
    if (!has_split() || split_taken_) return false;
    split_taken_ = true;
    place(tile, whole_tiles_ + cluster_ / 2, cluster_ % 2);
    const int middle = blocks_ / 2;
    tile.first_block = rank_ ? middle : 0, tile.blocks = rank_ ? blocks_ - middle : middle;
    tile.split = true;
    return true;
  }

 private:
  __device__ __forceinline__ void place(Tile& tile, int index, int member) const {
    const int group_tiles = TILE_GROUP * row_tiles_, group = index / group_tiles;
    const int within = index - group * group_tiles, first = group * TILE_GROUP;
    const int width = min(TILE_GROUP, token_tiles_ - first);
    tile.token = (first + within % width) * TOKENS;
    tile.slab = (within / width * CLUSTER + member) * (ROWS / SLAB_ROWS);
  }

  int blocks_, whole_tiles_, token_tiles_, row_tiles_, cluster_, next_, rank_;
  bool has_split_, split_taken_ = false;
};

DEVICE void stream_weights(const Operands& operands, const Shared& shared, TileQueue queue) {
  const int slab_pairs = (operands.rows + BLOCK - 1) / BLOCK;
  Ring ring;
  for (Tile tile; queue.pop(tile);) {
    for (int i = 0; i < tile.blocks; i++, ring.advance()) {
      shared.barriers.acquire(ring, WEIGHT_STAGE_BYTES);
#pragma unroll
      for (int pair = 0; pair < SLABS; pair++) {
        // Tiles may reach past the last row; what they multiply there is never stored.
        const int slab = min(tile.slab / 2 + pair, slab_pairs - 1) * 2;
        bulk_load(shared.weights + (ring.stage * SLABS + pair) * 2 * SLAB_BYTES,
                  slab_address(operands.weight, slab, tile.first_block + i, operands.k_blocks),
                  2 * SLAB_BYTES, shared.barriers.full(ring.stage));
      }
    }
  }
}

DEVICE void stream_tokens(const TensorMap* map, const Shared& shared, TileQueue queue) {
  constexpr int box_tokens = TOKENS / CLUSTER, box_bytes = box_tokens * BLOCK;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  wait_for_predecessor();
  Ring ring;
  for (Tile tile; queue.pop(tile);) {
    for (int i = 0; i < tile.blocks; i++, ring.advance()) {
      const uint32 stage = shared.tokens + ring.stage * TOKEN_STAGE_BYTES;
      const uint32 full = shared.barriers.full(ring.stage);
      const int column = (tile.first_block + i) * BLOCK;
      shared.barriers.acquire(ring, TOKEN_STAGE_BYTES);
      if (CLUSTER > 1 && !tile.split) {
        tensor_load_multicast(stage + rank * box_bytes, map, column, tile.token + rank * box_tokens,
                              full, (1 << CLUSTER) - 1);
        continue;
      }
#pragma unroll
      for (int box = 0; box < CLUSTER; box++)
        tensor_load(stage + box * box_bytes, map, column, tile.token + box * box_tokens, full);
    }
  }
}

// A stage may be written by either block of a cluster, so both learn that it has been read.
DEVICE void release(const Barriers& barriers, int stage) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // few lanes arrive for all, once all have read
  if (CLUSTER == 1 && lane < ARRIVING_LANES) mbarrier_arrive(barriers.empty(stage));
  if (CLUSTER > 1)
#pragma unroll
    for (int i = 0; i < CLUSTER * ARRIVING_LANES; i += 32)
      if (lane + i < CLUSTER * ARRIVING_LANES)
        mbarrier_arrive_peer(barriers.empty(stage), (lane + i) / ARRIVING_LANES);
}

// One tile's sums. A group of multiplies stays in flight while the next is dequantized; the two
// operand buffers alternate. `meanwhile()` is called while the last are in flight.
template <class Meanwhile>
DEVICE void accumulate(int (&accumulator)[SLABS][TOKENS / 2], const Shared& shared, Ring& ring,
                       int blocks, Meanwhile meanwhile) {
  const int first_slab = threadIdx.x / 128 * SLABS;
  uint32 even[SLABS][8 * HALVES], odd[SLABS][8 * HALVES];
  PackedFragment<HALVES> packed[SLABS];
  int remaining = blocks, read_stage = -1;
  bool started = false;

  auto load = [&](int half) {
    shared.barriers.wait_full(ring);
    const int first_slot = ring.stage * 2 * SLABS + first_slab;
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
      load_fragment(packed[slab], shared.weights + (first_slot + slab) * SLAB_BYTES, half);
  };
  auto step = [&](uint32(&operand)[SLABS][8 * HALVES], int half) {
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) dequantize(packed[slab], operand[slab]);
    const int stage = ring.stage;
    const uint64 tokens = wgmma_descriptor(shared.tokens + stage * TOKEN_STAGE_BYTES);
    multiply(accumulator, operand, tokens + half * 4, started);
    started = true;
    const bool last_half = half == GROUPS_PER_STAGE - 1;
    if (last_half) {
      ring.advance();
      remaining--;
    }
    if (remaining > 0) load(last_half ? 0 : half + 1);
    wgmma_wait<1>();
    if (half == 0 && read_stage >= 0) release(shared.barriers, read_stage);
    if (last_half) read_stage = stage;
    return remaining > 0;
  };

  load(0);
#pragma unroll 1
  while (step(even, 0) && step(odd, GROUPS_PER_STAGE - 1)) {
  }
  meanwhile();
  wgmma_wait<0>();
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++) pin(even[slab]), pin(odd[slab]);  // until here
  release(shared.barriers, read_stage);
}

// Of a split tile each block finishes half of the tokens: it gives the peer its sums of the other
// half, through the drained ring, and adds the peer's to its own.
DEVICE void exchange_halves(int (&accumulator)[SLABS][TOKENS / 2], const Shared& shared) {
  constexpr int half = TOKENS / 4;
  const int rank = cluster_rank(), thread = threadIdx.x;
  const uint32 mailbox = shared.tokens + thread * 16;
  named_barrier(1, CONSUMER_THREADS);
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
    for (int i = 0; i < half; i += 4) {
      int given[4];
#pragma unroll
      for (int e = 0; e < 4; e++)
        given[e] = rank ? accumulator[slab][i + e] : accumulator[slab][half + i + e];
      store_shared_16(mailbox + (slab * half + i) / 4 * CONSUMER_THREADS * 16, given[0], given[1],
                      given[2], given[3]);
    }
  cluster_sync();
  const uint32 peer = peer_address(mailbox, rank ^ 1);
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
    for (int i = 0; i < half; i += 4) {
      const int4 other = load_peer_16(peer + (slab * half + i) / 4 * CONSUMER_THREADS * 16);
      const int taken[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int own = rank ? accumulator[slab][half + i + e] : accumulator[slab][i + e];
        accumulator[slab][i + e] = own + taken[e];
      }
    }
}

// The outputs of 64 rows x 64 tokens, starting at accumulator `first`, into a staging buffer in the
// swizzled order that the copy engine expects.
DEVICE void stage_chunk(const int* first, uint32 terms, const Row (&rows)[2], uint32 buffer) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int token = lane / 16 * 8 + lane % 8;
  const uint32 column = ((warp * 2 + lane / 8 % 2) ^ (token % 8)) * 16;
#pragma unroll
  for (int step = 0; step < CHUNK_TOKENS / 16; step++) {
    uint32 packed[4];
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const int* sums = first + (step * 2 + part) * 4;
      const uint4 raw = load_shared_16(terms + ((step * 2 + part) * 8 + lane % 4 * 2) * 8);
      const Token tokens[2] = {{__uint_as_float(raw.x), static_cast<int>(raw.y)},
                               {__uint_as_float(raw.z), static_cast<int>(raw.w)}};
#pragma unroll
      for (int r = 0; r < 2; r++)
        packed[part * 2 + r] = pack_pair<BFLOAT16>(finish(sums[r * 2], rows[r], tokens[0]),
                                            finish(sums[r * 2 + 1], rows[r], tokens[1]));
    }
    store_matrices_transposed(buffer + (step * 16 + token) * BLOCK + column, packed);
  }
}

// A warpgroup's buffers: COUNT in turn, and what is left of them.
template <int COUNT>
struct Staging {
  uint32 buffers;
  int next = 0;

  __device__ __forceinline__ uint32 buffer() {
    const uint32 address = buffers + next * STAGING_BYTES;
    next = next + 1 == COUNT ? 0 : next + 1;
    return address;
  }
  __device__ __forceinline__ uint32 rest() const { return buffers + COUNT * STAGING_BYTES; }
};

// What this thread needs of a tile beside its sums: its rows' terms, and its share of the tokens'.
struct Terms {
  Row rows[SLABS][2];
  Token tokens[TOKENS / 128];

  __device__ __forceinline__ void fetch(const Operands& operands, const Tile& tile) {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int last_slab = (round_up(operands.rows, BLOCK) - 1) / SLAB_ROWS;
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
      const int first_row = min(tile.slab + warpgroup * SLABS + slab, last_slab) * SLAB_ROWS;
      const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
      rows[slab][0] = load_row(operands, row), rows[slab][1] = load_row(operands, row + 8);
    }
#pragma unroll
    for (int i = 0; i < TOKENS / 128; i++)
      tokens[i] = load_token(operands, tile.token + i * 128 + thread);
  }

  // Gives the tokens' to the whole warpgroup.
  __device__ __forceinline__ void share(uint32 address) const {
#pragma unroll
    for (int i = 0; i < TOKENS / 128; i++)
      store_shared_8(address + (i * 128 + threadIdx.x % 128) * sizeof(Token),
                     __float_as_uint(tokens[i].scale), tokens[i].sum);
    named_barrier(2 + threadIdx.x / 128, 128);
  }
};

// A tile's outputs, as a warpgroup stages them, 64 x 64 at a time: `take(slab, chunk, buffer, first row,
// first token)`.
template <class Buffers, class Take>
DEVICE void stage_tile(const int (&accumulator)[SLABS][TOKENS / 2], const Terms& terms,
                       uint32 tokens, const Tile& tile, Buffers& staging, Take take) {
  const int half = tile.split ? cluster_rank() * (TOKENS / 2) : 0;
  const int chunks = CHUNKS / (tile.split ? 2 : 1);
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++) {
    const int first_row = (tile.slab + threadIdx.x / 128 * SLABS + slab) * SLAB_ROWS;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      if (chunk >= chunks) break;
      const int token = half + chunk * CHUNK_TOKENS;
      const uint32 buffer = staging.buffer();
      stage_chunk(&accumulator[slab][chunk * CHUNK_TOKENS / 2], tokens + token * sizeof(Token),
                  terms.rows[slab], buffer);
      take(slab, chunk, buffer, first_row, tile.token + token);
    }
  }
}

// Outputs that are stored, and no more.
struct StoredOutputs {
  using Buffers = Staging<STAGING_BUFFERS>;
  const TensorMap* map;

  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ void expect(const Tile&, const Buffers&) const {}

  __device__ __forceinline__ void finish(int (&accumulator)[SLABS][TOKENS / 2],
                                         const Terms& terms, uint32 tokens, const Tile& tile,
                                         Buffers& staging) const {
    const bool is_first = threadIdx.x % 128 == 0;
    stage_tile(accumulator, terms, tokens, tile, staging, [&](int, int, uint32 buffer, int first_row, int first_token) {
                           fence_for_copy_engine();
                           // At most one store still reads, so the buffer written next is free.
                           if (is_first) tensor_store_wait_read<1>();
                           named_barrier(2 + threadIdx.x / 128, 128);
                           if (is_first) tensor_store(map, buffer, first_row, first_token);
                         });
  }
  __device__ __forceinline__ void end() const {
    if (threadIdx.x % 128 == 0) tensor_store_wait();
  }
  __device__ __forceinline__ void work_meanwhile() const {}
};

// Outputs: what is done with a tile's, `finish`, which may use up the sums. `expect` is called when a tile
// is begun, `begin` before all, `end` after all, and `work_meanwhile` by two warps that would be idle.
template <class Outputs>
DEVICE void consume(const Operands& operands, const Shared& shared, TileQueue queue,
                    const Outputs& outputs) {
  const int warpgroup = threadIdx.x / 128;
  const uint32 tokens = shared.terms + warpgroup * TOKENS * sizeof(Token);
  typename Outputs::Buffers staging{shared.staging +
                                    warpgroup * STAGING_BUFFERS * STAGING_BYTES};
  Ring ring;
  int accumulator[SLABS][TOKENS / 2];
  Terms terms;
  wait_for_predecessor();
  outputs.begin();
  Tile tile, next;
#pragma unroll 1
  for (bool more = queue.pop(next); more;) {
    tile = next;
    terms.fetch(operands, tile);
    outputs.expect(tile, staging);
    accumulate(accumulator, shared, ring, tile.blocks, [&] {
      terms.share(tokens);  // whose readers of the last tile met after they had read
      more = queue.pop(next);
    });
    if (tile.split) exchange_halves(accumulator, shared);
    outputs.finish(accumulator, terms, tokens, tile, staging);
  }
  outputs.end();
}

// All of a kernel.
template <class Outputs>
DEVICE void multiply_tiles(const TensorMap* token_map, const Operands& operands, int whole_tiles,
                           const Outputs& outputs) {
  const Shared shared(round_up(shared_address(shared_memory), 1024));
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const auto queue = [&] { return TileQueue(operands, whole_tiles); };

  launch_dependents();
  if (threadIdx.x == 0) shared.barriers.init(CONSUMER_WARPS * CLUSTER * ARRIVING_LANES);
  if (CLUSTER > 1) cluster_sync(); else __syncthreads();

  if (warp < CONSUMER_WARPS) {
    take_registers<232>();
    consume(operands, shared, queue(), outputs);
  } else {
    give_registers<40>();
    if (warp == CONSUMER_WARPS && lane == 0) stream_weights(operands, shared, queue());
    if (warp == CONSUMER_WARPS + 1 && lane == 0) stream_tokens(token_map, shared, queue());
    if (warp >= CONSUMER_WARPS + 2) outputs.work_meanwhile();
    __syncwarp();
    if (queue().has_split()) cluster_sync();  // the one inside exchange_halves
  }
  // No block ends while its peer may still write into it.
  if (CLUSTER > 1) cluster_sync();
}
