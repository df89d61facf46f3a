// What follows a GEMM of many tokens and needs whole rows of its output, in the same launch: residual
// add, RMSNorm and quantization. A block that has no more tiles takes the next rows that nobody has
// taken, one for each of its teams, as soon as all blocks have stored their parts of them.
//
// A warp that has nothing else to do keeps the books: it counts stored tiles and hands out rows.
#pragma once
#include "rows.cuh"

constexpr int TEAM_THREADS = TEAMS * THREADS;
static_assert(TEAM_THREADS <= CONSUMER_THREADS, "rows take more threads than a block has");
static_assert(TOKENS % TEAMS == 0, "rows handed out together are of one token tile");

constexpr int POLL_NANOSECONDS = 100;

// In global memory; all zeros between launches.
struct Progress {
  int drawn;                     // rows, of those that are not shared out beforehand
  int finished;                  // blocks that draw no more
  int halves[MOST_TOKEN_TILES];  // stored, of the tiles of each token tile
};

__shared__ int confirmed;      // how often warpgroups have said that their stores are complete
__shared__ int handed_out[2];  // first rows, in turn

// Which token tiles are, as a warp has seen it, for each a lane.
struct CompleteTiles {
  const int* stored;
  int halves;  // that a complete one has
  int first = 0;
  uint32 seen = 0;

  // Tiles are asked for in ascending order.
  __device__ __forceinline__ void await(int tile) {
    while (tile - first >= 32 || (seen >> (tile - first) & 1) == 0) {
      first = tile;
      const int own = min(tile + static_cast<int>(threadIdx.x % 32), MOST_TOKEN_TILES - 1);
      seen = __ballot_sync(FULL_WARP, load_acquire_grid(&stored[own]) >= halves);
    }
  }
};

struct NormTail {
  static constexpr int MULTIPLIER_REGISTERS = 224, OTHER_REGISTERS = 56;

  const Norm& norm;
  const Quantized& out;
  const uint16* product;
  Progress* progress;
  int rows;
  int turn = 0;

  __device__ __forceinline__ void init() const { confirmed = 0; }

  // ---- for the threads that multiply -----------------------------------------------------------

  // Called in every tile, when the stores of the one before must be complete, and after the last. Who
  // knows that bulk stores are complete sees what they wrote with ordinary loads: an implicit proxy
  // fence follows their completion (PTX ISA, "Async proxy").
  __device__ __forceinline__ void confirm_stored() const {
    if (threadIdx.x % 128 > 0) return;
    tensor_store_wait();
    add_release_block(&confirmed, 1);
  }

  // Of two rows under way one comes while the other is normalized and the next fetched in its place.
  __device__ __forceinline__ void finish_rows() {
    if (threadIdx.x >= TEAM_THREADS) return;
    NormRow even(norm), odd(norm);
    int even_first = take(even, true), odd_first = take(odd, even_first < rows);
    while (even_first < rows) {
      even_first = finish(even, even_first, odd_first < rows);
      if (odd_first < rows) odd_first = finish(odd, odd_first, even_first < rows);
    }
  }

  // ---- for the warp that keeps the books -------------------------------------------------------

  // While others still multiply.
  __device__ __forceinline__ void count_whole_tiles(TileQueue queue) const {
    wait_for_predecessor();  // which may still use `progress`
    int before = 0;
    for (Tile tile; queue.pop(tile) && !tile.split; before++) count(tile, before);
  }

  // When there are no more tiles, but perhaps half of one. A block's first two turns are fixed; others
  // are drawn two turns ahead, since the answer takes its time.
  __device__ __forceinline__ void hand_out_rows(const TileQueue& queue) {
    if (queue.has_split()) count_split_tile(queue);
    const int round = gridDim.x * TEAMS;
    CompleteTiles complete{progress->halves, 2 * queue.row_blocks()};
    int first = blockIdx.x * TEAMS, second = first + round, drawn = draw(second);
    bool more;
    do {
      prefetch_residual(second);
      if (first < rows) complete.await(first / TOKENS);
      if (threadIdx.x % 32 == 0) handed_out[turn] = first;
      __syncwarp();
      more = take_turn() < rows;
      first = second, second = 2 * round + __shfl_sync(FULL_WARP, drawn, 0);
      drawn = draw(second);
    } while (more);
    finish_books();
  }

 private:
  // Both sides meet, and learn the first of the rows that come next.
  __device__ __forceinline__ int take_turn() {
    named_barrier(4, TEAM_THREADS + 32);
    turn ^= 1;
    return handed_out[turn ^ 1];
  }

  // If there may be more rows, takes some and has this team's fetched. Returns their first.
  __device__ __forceinline__ int take(NormRow& norm_row, bool more) {
    const int first = more ? take_turn() : rows, row = first + team();
    if (row < rows) {
      norm_row.fetch_residual(row);
      norm_row.fetch_x(product, row);
    }
    return first;
  }

  // Finishes this team's of the rows from `first` on, and takes more in its place.
  __device__ __forceinline__ int finish(NormRow& norm_row, int first, bool more) {
    const int row = first + team();
    if (row >= rows) return take(norm_row, more);
    int next;
    Values values;
    norm_row.normalize(values, row, [&] { next = take(norm_row, more); });
    quantize_row(values, out, row);
    return next;
  }

  __device__ __forceinline__ void count_split_tile(TileQueue queue) const {
    int before = -1;
    Tile tile;
    while (queue.pop(tile)) before++;
    count(tile, before);
  }

  // A tile of this block that had so many before it, as soon as it is stored.
  __device__ __forceinline__ void count(const Tile& tile, int before) const {
    if (threadIdx.x % 32 > 0) return;
    while (load_acquire_block(&confirmed) < (before + 2) * (CONSUMER_THREADS / 128))
      __nanosleep(POLL_NANOSECONDS);
    add_release_grid(&progress->halves[tile.token / TOKENS], tile.split ? 1 : 2);
  }

  // If there are rows from `previous` on, asks for later ones. The first lane's is the answer.
  __device__ __forceinline__ int draw(int previous) const {
    if (threadIdx.x % 32 > 0 || previous >= rows) return rows;
    return atomicAdd(&progress->drawn, TEAMS);
  }

  __device__ __forceinline__ void prefetch_residual(int first) const {
    if (threadIdx.x % 32 > 0 || first >= rows) return;
    prefetch(norm.residual + static_cast<int64>(first) * COLUMNS,
             min(TEAMS, rows - first) * COLUMNS * sizeof(uint16));
  }

  // The last block makes everything ready for the next launch.
  __device__ __forceinline__ void finish_books() const {
    if (threadIdx.x % 32 > 0 || add_ordered_grid(&progress->finished, 1) + 1 < gridDim.x) return;
    progress->drawn = progress->finished = 0;
    for (int tile = 0; tile * TOKENS < rows; tile++) progress->halves[tile] = 0;
  }
};
