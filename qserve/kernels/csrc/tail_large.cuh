// What follows a GEMM of many tokens and needs whole rows of its output, in the same launch: residual
// add, RMSNorm and quantization. A tile's outputs stay in registers. What others need to know of them,
// for each token the sum of their squares and their largest weighted magnitude, goes to an inbox; as
// soon as all blocks that have a part of a token's row have told theirs, all of them make codes.
//
// The grid is as large as makes all outputs of some token tiles at once, so a block waits only for blocks
// that are as far as it is. There are two inboxes, for launches in turn: as in tail_small.cuh, NOTHING
// stands in one where nothing has come, and each launch empties the other's.
#pragma once
#include "rows.cuh"

static_assert(CLUSTER == 1 && SLABS == 1, "tiles are whole, and a thread keeps its columns");

constexpr int PARTS = (COLUMNS + ROWS - 1) / ROWS;  // of a token's row, a block each
constexpr int BATCH = PARTS < 16 ? PARTS : 16;      // parts on their way together
constexpr int STEPS = CHUNK_TOKENS / 16;            // of 16 tokens, whose vectors threads read together
constexpr uint32 NOTHING = 0xFFFFFFFFu;             // a NaN of a kind that no arithmetic gives
constexpr int CLEANERS = 64;                        // threads that empty the other inbox

// Of launches that share inboxes, in global memory.
struct Turns {
  int inbox;     // this launch's, 0 or 1
  int finished;  // blocks that have emptied their share of the other
  int used[2];   // of each inbox, vectors of 16 bytes, by its last launch
};

__shared__ int own_inbox;
// Of each warpgroup's columns.
__shared__ float2 own_parts[2][TOKENS];
__shared__ int own_sums[2][TOKENS];
// Of each token: the factor of its norm, and of its codes.
__shared__ float2 factors[TOKENS];

// values: those of 8 neighbouring lanes each. This lane's of the four combinations over them, lane / 2 % 4.
template <class T, class Combine>
DEVICE T combine_eighths(const T (&values)[4], Combine combine) {
  const bool high = threadIdx.x & 4, odd = threadIdx.x & 2;
  auto fold = [&](bool upper, T low, T high, int lanes) {
    return combine(upper ? high : low, __shfl_xor_sync(FULL_WARP, upper ? low : high, lanes));
  };
  const T first = fold(high, values[0], values[2], 4), second = fold(high, values[1], values[3], 4);
  const T own = fold(odd, first, second, 2);
  return combine(own, __shfl_xor_sync(FULL_WARP, own, 1));
}

// What one thread has of a tile: a vector of its warpgroup's columns, of every 16th token.
struct Share {
  int first_token, tokens;  // this thread's first, and how many there are from there on
  int first_column;         // of its vector

  __device__ __forceinline__ Share(const Tile& tile, int all_tokens) {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    first_token = tile.token + thread / 8;
    tokens = all_tokens - first_token;
    first_column = (tile.slab + warpgroup) * SLAB_ROWS + thread % 8 * WIDTH;
  }
  // What follows from it is computed again, which takes fewer registers than to keep it.
  __device__ __forceinline__ void renew() { pin(first_token), pin(tokens), pin(first_column); }

  // The vector's place in a matrix of COLUMNS; only the start is not known to the compiler.
  template <class T>
  __device__ __forceinline__ T* at(T* matrix, int chunk, int step) const {
    return matrix + (static_cast<int64>(first_token) * COLUMNS + first_column) +
           (chunk * CHUNK_TOKENS + step * 16) * COLUMNS;
  }
  __device__ __forceinline__ bool has(int chunk, int step) const {
    return chunk * CHUNK_TOKENS + step * 16 < tokens && first_column < COLUMNS;
  }
};

class NormedOutputs {
 public:
  using Buffers = Staging<2>;  // the last one holds residuals to come

  __device__ __forceinline__ NormedOutputs(const Norm& norm, const Quantized& out, uint2* inboxes,
                                           Turns* turns, int tokens)
      : norm_(norm), out_(out), inboxes_(inboxes), turns_(turns), tokens_(tokens) {}

  // ---- for the threads that multiply -----------------------------------------------------------

  __device__ __forceinline__ void begin() const { meet_cleaners(); }

  // The residual is on its way while the tile is multiplied: to the L2 cache, the first of it all the way.
  __device__ __forceinline__ void expect(const Tile& tile, const Buffers& staging) const {
    const int token = tile.token + threadIdx.x, column = tile.slab * SLAB_ROWS;
    if (threadIdx.x < TOKENS && token < tokens_) {
      if (column == 0) out_.row_sum[token] = 0;
      prefetch(norm_.residual + static_cast<int64>(token) * COLUMNS + column,
               min(ROWS, COLUMNS - column) * sizeof(uint16));
    }
    copy_residual(Share(tile, tokens_), 0, staging.rest());
  }

  __device__ __forceinline__ void finish(int (&accumulator)[1][TOKENS / 2], const Terms& terms,
                                         uint32 token_terms, const Tile& tile,
                                         Buffers& staging) const {
    Share share(tile, tokens_);
    share.renew();
    uint4 totals[CHUNKS][STEPS];
    stage_tile(accumulator, terms, token_terms, tile, staging,
               [&](int, int chunk, uint32 buffer, int, int) {
                 add_residual(totals[chunk], buffer, staging.rest(), share, chunk);
               });
    named_barrier(1, CONSUMER_THREADS);
    // A thread speaks for a token.
    const bool speaks = threadIdx.x < TOKENS && tile.token + threadIdx.x < tokens_;
    if (speaks) {
      tell(tile);
      gather(tile);
    }
    named_barrier(1, CONSUMER_THREADS);
    share.renew();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) quantize(totals[chunk], share, chunk);
    named_barrier(1, CONSUMER_THREADS);
    if (speaks)
      atomicAdd(&out_.row_sum[tile.token + threadIdx.x],
                own_sums[0][threadIdx.x] + own_sums[1][threadIdx.x]);
    forget(accumulator);
  }

  __device__ __forceinline__ void end() const {}

  // ---- for two warps that would be idle --------------------------------------------------------

  // The last block that has emptied its share of the other inbox says that it is the next launch's.
  __device__ __forceinline__ void work_meanwhile() const {
    wait_for_predecessor();
    const int thread = threadIdx.x % CLEANERS, own = turns_->inbox;
    if (thread == 0) own_inbox = own;
    meet_cleaners();
    uint4* other = reinterpret_cast<uint4*>(inboxes_ + (1 - own) * INBOX_PARTS);
    const int used = turns_->used[1 - own];
    for (int i = blockIdx.x * CLEANERS + thread; i < used; i += gridDim.x * CLEANERS)
      other[i] = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
    named_barrier(5, CLEANERS);
    if (thread > 0 || add_ordered_grid(&turns_->finished, 1) + 1 < gridDim.x) return;
    turns_->inbox = 1 - own, turns_->finished = 0;
    turns_->used[own] = (tokens_ + TOKENS - 1) / TOKENS * PARTS * TOKENS / 2;
  }

 private:
  // Lets the registers of sums hold totals between tiles: to the compiler, multiplies only add.
  static __device__ __forceinline__ void forget(int (&accumulator)[1][TOKENS / 2]) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) accumulator[0][i] = 0;
  }

  // Of the tokens of a chunk, this thread's.
  static __device__ __forceinline__ int token_of(int step) {
    return step * 16 + threadIdx.x % 128 / 8;
  }

  // Gives a chunk's combined value, of which each thread pair has one, to all.
  template <class T>
  static __device__ __forceinline__ void share_out(T (&places)[2][TOKENS], int chunk, T value) {
    const int token = chunk * CHUNK_TOKENS + token_of(threadIdx.x / 2 % 4);
    if (threadIdx.x % 2 == 0) places[threadIdx.x / 128][token] = value;
  }

  __device__ __forceinline__ void fetch_weights(float (&weights)[WIDTH], const Share& share) const {
    constexpr int words = sizeof(NormWeight) / 2;
    uint4 raw[words];
#pragma unroll
    for (int word = 0; word < words; word++)
      raw[word] = reinterpret_cast<const uint4*>(
          norm_.weight + min(share.first_column, COLUMNS - WIDTH))[word];
    unpack(raw, weights);
  }

  // Of a chunk, by each thread what it will read.
  __device__ __forceinline__ void copy_residual(const Share& share, int chunk, uint32 buffer) const {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
      copy_async_16(residual_slot(buffer, step), share.at(norm_.residual, chunk, step),
                    share.has(chunk, step));
    copy_async_commit();
  }
  static __device__ __forceinline__ uint32 residual_slot(uint32 buffer, int step) {
    return buffer + (step * 128 + threadIdx.x % 128) * 16;
  }

  // To a chunk of outputs in a staging buffer.
  __device__ __forceinline__ void add_residual(uint4 (&totals)[STEPS], uint32 buffer,
                                               uint32 residuals, const Share& share,
                                               int chunk) const {
    float weights[WIDTH], squares[STEPS], largest[STEPS];
    fetch_weights(weights, share);
    copy_async_wait<0>();
    named_barrier(2 + threadIdx.x / 128, 128);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int token = token_of(step);
      const uint4 x = load_shared_16(buffer + token * BLOCK + ((threadIdx.x ^ token) % 8) * 16);
      float values[WIDTH];
      totals[step] = add_vectors(x, load_shared_16(residual_slot(residuals, step)));
      unpack_vector<BFLOAT16>(totals[step], values);
      squares[step] = 0, largest[step] = 0;
      if (!share.has(chunk, step)) continue;
      *reinterpret_cast<uint4*>(share.at(norm_.total, chunk, step)) = totals[step];
      squares[step] = sum_of_squares(values);
#pragma unroll
      for (int e = 0; e < WIDTH; e++)
        largest[step] = fmaxf(largest[step], fabsf(weighted(values[e], weights[e])));
    }
    if (chunk + 1 < CHUNKS) copy_residual(share, chunk + 1, residuals);
    share_out(own_parts, chunk,
              {combine_eighths(squares, Sum()), combine_eighths(largest, Max())});
  }

  // The part that this block has of a token's row; the first block's says, too, that its sum of codes is 0.
  __device__ __forceinline__ void tell(const Tile& tile) const {
    const float2 first = own_parts[0][threadIdx.x], second = own_parts[1][threadIdx.x];
    const uint32 squares = __float_as_uint(first.x + second.x);
    const uint32 largest = __float_as_uint(fmaxf(first.y, second.y));
    if (tile.slab == 0)
      store_release_8(part(tile, 0), squares, largest);
    else
      store_relaxed_8(part(tile, own_part(tile)), squares, largest);
  }

  // Waits for all parts; what follows from them.
  __device__ __forceinline__ void gather(const Tile& tile) const {
    float squares = 0, largest = 0;
#pragma unroll
    for (int start = 0; start < PARTS; start += BATCH) add_parts(tile, start, squares, largest);
    const float factor = inverse_rms(squares, norm_.eps);
    const float top = fmaxf(__fmul_rn(largest, factor), 0.0f);  // if that is no number, none is larger
    factors[threadIdx.x] = {factor, inverse_scale(top)};
    if (tile.slab == 0) out_.scale[tile.token + threadIdx.x] = code_scale(top);
  }

  // The squares in the order in which a producer adds them, by 256 columns.
  __device__ __forceinline__ void add_parts(const Tile& tile, int start, float& squares,
                                            float& largest) const {
    uint2 parts[BATCH];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        const uint2* told = part(tile, min(start + i, PARTS - 1));
        parts[i] = start + i == 0 ? load_acquire_8(told) : load_relaxed_8(told);
      }
#pragma unroll
      for (int i = 0; i < BATCH; i++) all = all && parts[i].x != NOTHING && parts[i].y != NOTHING;
    } while (!all);
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      largest = fmaxf(largest, __uint_as_float(parts[i].y));
      if (i % 2 == 1 || start + i >= PARTS) continue;
      const bool has_second = i + 1 < BATCH && start + i + 1 < PARTS;
      squares += __uint_as_float(parts[i].x) +
                 (has_second ? __uint_as_float(parts[has_second ? i + 1 : i].x) : 0);
    }
  }

  __device__ __forceinline__ void quantize(const uint4 (&totals)[STEPS], const Share& share,
                                           int chunk) const {
    float weights[WIDTH];
    fetch_weights(weights, share);
    int sums[STEPS] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const float2 factor = factors[chunk * CHUNK_TOKENS + token_of(step)];
      float values[WIDTH];
      unpack_vector<BFLOAT16>(totals[step], values);
#pragma unroll
      for (int e = 0; e < WIDTH; e++)
        values[e] = __fmul_rn(weighted(values[e], weights[e]), factor.x);
      if (share.has(chunk, step))
        quantize_vector(values, factor.y, share.at(out_.codes, chunk, step), sums[step]);
    }
    share_out(own_sums, chunk, combine_eighths(sums, Sum()));
  }

  // All of a block know which inbox is theirs.
  static __device__ __forceinline__ void meet_cleaners() {
    named_barrier(4, CONSUMER_THREADS + CLEANERS);
  }

  static __device__ __forceinline__ int own_part(const Tile& tile) { return tile.slab / 2; }

  // Of this thread's token, in an inbox: [token tiles][PARTS][TOKENS].
  __device__ __forceinline__ uint2* part(const Tile& tile, int index) const {
    return inboxes_ + (own_inbox * INBOX_PARTS + tile.token * PARTS + threadIdx.x) + index * TOKENS;
  }

  const Norm& norm_;
  const Quantized& out_;
  uint2* inboxes_;  // [2][INBOX_PARTS]
  Turns* turns_;
  int tokens_;
};
