// Causal attention of prompt chunks over quantized pages on Hopper, without a workspace.
//
// A block takes one tile after the other: up to 128 rows, the queries of a few positions times the
// query heads that share a KV head. Four warps dequantize each page of it once, into a ring of
// tiles in shared memory (`prefill_page.cuh`); two warpgroups multiply them by 64 rows each. A
// page's scores are multiplied while the values of the page before are, and one warpgroup's softmax
// overlaps with the other's multiplies.
//
// A row's result depends on its own query and on the keys that it sees: pages come in order of
// their absolute position, what a row does not see adds exact zeros, and when the reference of its
// softmax moves depends on this row only. Products are of float16 operands, with float32 sums.
#include "barrier.cuh"
#include "half.cuh"
#include "prefill_page.cuh"

constexpr int TILE_ROWS = 128;
constexpr int CONSUMER_WARPS = 8, PRODUCER_WARPS = 4;
constexpr int THREADS = (CONSUMER_WARPS + PRODUCER_WARPS) * 32;
constexpr int SCORES = PAGE_TOKENS / 2;  // of one thread: two rows
constexpr int OUTPUTS = HEAD_DIM / 2;
constexpr int STEP = 16;                 // channels or tokens of one multiply, rows of a warp
constexpr int TILES_BYTES = 2 * STAGES * TILE_BYTES;
static_assert(1024 + TILES_BYTES + 4 * STAGES * 8 <= SHARED_BYTES,
              "the launch gives too little shared memory");

// Weights are 2^(score - reference). The reference follows the row's largest score, HEADROOM below
// it, but only once that has risen by more than SLACK, so that outputs are seldom rescaled.
constexpr float HEADROOM = 5.0f, SLACK = 8.0f;
constexpr float LOWEST = -1e30f;

struct Tile {
  int sequence, first_query, first_position, queries;
};

struct Arguments {
  const uint16* q;  // [T, KV_HEADS * GROUP, HEAD_DIM]
  const uint8* pool;
  const int* page_table;
  const int4* tiles;  // as `Tile`, those with most pages first
  uint16* out;
  int table_width, works, window;
  float unit;  // of the scores, in powers of two
};

// A tile for one KV head.
struct Work {
  Tile tile;
  int head, first_page, end_page;

  __device__ __forceinline__ int last_position() const {
    return tile.first_position + tile.queries - 1;
  }
};

// The works of a block, dealt in snake order; each is loaded while the one before is done.
class Schedule {
 public:
  __device__ __forceinline__ explicit Schedule(const Arguments& arguments) : arguments_(arguments) {
    load();
  }

  __device__ __forceinline__ bool pop(Work& work) {
    if (index_ >= arguments_.works) return false;
    work.tile = {loaded_.x, loaded_.y, loaded_.z, loaded_.w};
    work.head = index_ % KV_HEADS;
    work.first_page = max(work.tile.first_position - arguments_.window + 1, 0) / PAGE_TOKENS;
    work.end_page = work.last_position() / PAGE_TOKENS + 1;
    load();
    return true;
  }

 private:
  __device__ __forceinline__ void load() {
    const int blocks = gridDim.x, block = blockIdx.x;
    index_ = round_ * blocks + (round_ % 2 ? blocks - 1 - block : block);
    round_++;
    if (index_ < arguments_.works) loaded_ = arguments_.tiles[index_ / KV_HEADS];
  }

  const Arguments& arguments_;
  int round_ = 0, index_;
  int4 loaded_;
};

struct Ring {
  int stage = 0;
  uint32 phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

enum Half { KEYS, VALUES };

// STAGES pages, each a tile of K and one of V with barriers of their own.
struct Shared {
  uint32 tiles, barriers;

  __device__ __forceinline__ explicit Shared(uint32 base)
      : tiles(base), barriers(base + TILES_BYTES) {}
  __device__ __forceinline__ uint32 tile(Half half, int stage) const {
    return tiles + (stage * 2 + half) * TILE_BYTES;
  }
  __device__ __forceinline__ uint32 full(Half half, int stage) const {
    return barriers + (stage * 2 + half) * 16;
  }
  __device__ __forceinline__ uint32 empty(Half half, int stage) const {
    return full(half, stage) + 8;
  }
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < 2 * STAGES; i++) {
      barrier_init(barriers + i * 16, PRODUCER_WARPS * ARRIVING_LANES);
      barrier_init(barriers + i * 16 + 8, CONSUMER_WARPS * ARRIVING_LANES);
    }
  }
};

// One arrival for a warp, once all of its lanes have read or written.
DEVICE void warp_arrive(uint32 barrier) {
  __syncwarp();
  if (threadIdx.x % 32 < ARRIVING_LANES) barrier_arrive(barrier);
}

// ---- producers ---------------------------------------------------------------------------------

// One page of one head on its way; `tokens` of it are visible to anyone.
struct Source {
  int id, head, tokens;

  __device__ __forceinline__ const uint8* block(const Arguments& arguments) const {
    return base(arguments.pool + (static_cast<int64>(id) * KV_HEADS + head) * BLOCK_BYTES);
  }
};

// The pages of a block's works, one after the other.
class Pages {
 public:
  __device__ __forceinline__ explicit Pages(const Arguments& arguments)
      : arguments_(arguments), schedule_(arguments) {
    open();
  }

  __device__ __forceinline__ bool pop(Source& source) {
    if (!open_) return false;
    const int64 row = static_cast<int64>(work_.tile.sequence) * arguments_.table_width;
    source.id = __ldg(arguments_.page_table + row + page_);
    source.head = work_.head;
    source.tokens = work_.last_position() + 1 - page_ * PAGE_TOKENS;
    if (++page_ == work_.end_page) open();
    return true;
  }

 private:
  __device__ __forceinline__ void open() {
    open_ = schedule_.pop(work_);
    page_ = work_.first_page;
  }

  const Arguments& arguments_;
  Schedule schedule_;
  Work work_;
  int page_;
  bool open_;
};

template <class HalfCodes>
DEVICE void put(HalfCodes& codes, const Shared& shared, Half half, const Ring& ring) {
  barrier_wait(shared.empty(half, ring.stage), ring.phase ^ 1);
  codes.store(shared.tile(half, ring.stage));
  fence_for_copy_engine();  // the multiplies read by the same path
  warp_arrive(shared.full(half, ring.stage));
}

// Codes are loaded one page ahead, a page's id two pages ahead.
DEVICE void produce(const Arguments& arguments, const Shared& shared) {
  Pages pages(arguments);
  Source source;
  KeyCodes keys;
  ValueCodes values;
  bool more = pages.pop(source);
  if (!more) return;
  keys.load(source.block(arguments), source.tokens);
  values.load(source.block(arguments), source.tokens);
  more = pages.pop(source);
  Ring ring;
#pragma unroll 1
  while (true) {
    put(keys, shared, KEYS, ring);
    if (more) keys.load(source.block(arguments), source.tokens);
    put(values, shared, VALUES, ring);
    if (!more) break;
    values.load(source.block(arguments), source.tokens);
    more = pages.pop(source);
    ring.advance();
  }
}

// ---- consumers ---------------------------------------------------------------------------------

// What a thread knows of its two rows, 8 apart.
struct Rows {
  int64 offset[2];  // of the head's channels in q and in out
  int position[2];
  bool valid[2];

  __device__ __forceinline__ explicit Rows(const Work& work) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = threadIdx.x / 32 * STEP + threadIdx.x % 32 / 4 + half * 8;
      const int query = row / GROUP;
      const int64 token = work.tile.first_query + query;
      offset[half] = ((token * KV_HEADS + work.head) * GROUP + row % GROUP) * HEAD_DIM;
      position[half] = work.tile.first_position + query;
      valid[half] = query < work.tile.queries;
    }
  }
};

DEVICE uint32 to_float16(uint32 pair) {
  if (!BFLOAT16) return pair;
  const float2 v = unpack_pair<true>(pair);
  return pack_pair<false>(v.x, v.y);
}

DEVICE void load_query(uint32 (&query)[OUTPUTS / 2], const uint16* q, const Rows& rows) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int step = 0; step < HEAD_DIM / STEP; step++) {
      const uint16* channels = q + rows.offset[half] + step * STEP + threadIdx.x % 4 * 4;
      const uint2 v = rows.valid[half] ? *reinterpret_cast<const uint2*>(channels) : uint2{};
      query[step * 4 + half] = to_float16(v.x);
      query[step * 4 + 2 + half] = to_float16(v.y);
    }
}

// scores = q K of one page, as a group in flight.
DEVICE void multiply_keys(float (&scores)[SCORES], uint32 (&query)[OUTPUTS / 2], uint32 tile) {
  pin(query), pin(scores);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / STEP; step++)
    wgmma(scores, query[step * 4], query[step * 4 + 1], query[step * 4 + 2], query[step * 4 + 3],
          wgmma_descriptor(tile) + step / 4 * (COLUMN_BYTES / 16) + step % 4 * 2, step > 0);
  wgmma_commit();
}

// outputs += weights V of one page, as a group in flight.
DEVICE void multiply_values(float (&outputs)[OUTPUTS], uint32 (&weights)[SCORES / 2], uint32 tile) {
  pin(weights), pin(outputs);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < PAGE_TOKENS / STEP; step++)
    wgmma(outputs, weights[step * 4], weights[step * 4 + 1], weights[step * 4 + 2],
          weights[step * 4 + 3], wgmma_descriptor(tile) + step * 2, true);
  wgmma_commit();
}

// Score 4 j + 2 half + e is that of token 16 (j % 4) + 8 e + 4 (j / 4) + lane % 4: see `tile_row`.
DEVICE void hide(float (&scores)[SCORES], const Rows& rows, int first_token, int window) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int newest = rows.position[half] - first_token - threadIdx.x % 4;
    const int gone = newest - window;
#pragma unroll
    for (int i = 0; i < SCORES / 2; i++) {
      const int j = i / 2, e = i % 2, token = j % 4 * 16 + e * 8 + j / 4 * 4;
      if (token > newest || token <= gone) scores[4 * j + 2 * half + e] = minus_infinity();
    }
  }
}

DEVICE float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

DEVICE float sum_of_row(float x) {
  x += __shfl_xor_sync(FULL_WARP, x, 1);
  return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// The online softmax of a thread's two rows; `sum` is of its own columns.
struct Softmax {
  float reference[2] = {LOWEST, LOWEST}, sum[2] = {}, shrink[2];

  // Scores to weights.
  __device__ __forceinline__ void weigh(float (&scores)[SCORES], float unit) {
    float largest[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
    for (int i = 0; i < SCORES; i += 2)
      largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fmaxf(scores[i], scores[i + 1]));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float wanted = largest_of_row(largest[half]) * unit - HEADROOM;
      const float next = wanted > reference[half] + SLACK ? wanted : reference[half];
      shrink[half] = power_of_two(reference[half] - next);
      reference[half] = next;
      sum[half] *= shrink[half];
    }
#pragma unroll
    for (int i = 0; i < SCORES; i++) {
      scores[i] = power_of_two(fmaf(scores[i], unit, -reference[i / 2 % 2]));
      sum[i / 2 % 2] += scores[i];
    }
  }

  __device__ __forceinline__ void rescale(float (&outputs)[OUTPUTS]) const {
    if (!__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) outputs[i] *= shrink[i / 2 % 2];
  }
};

DEVICE void pack(uint32 (&weights)[SCORES / 2], const float (&scores)[SCORES]) {
#pragma unroll
  for (int i = 0; i < SCORES / 2; i++)
    weights[i] = pack_pair<false>(scores[2 * i], scores[2 * i + 1]);
}

DEVICE void store_outputs(uint16* out, const float (&outputs)[OUTPUTS], const Softmax& softmax,
                          const Rows& rows) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float factor = 1.0f / sum_of_row(softmax.sum[half]);
    uint4* row = reinterpret_cast<uint4*>(out + rows.offset[half] + threadIdx.x % 4 * 8);
    if (!rows.valid[half]) continue;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      float x[8];
#pragma unroll
      for (int c = 0; c < 8; c++) x[c] = outputs[(4 * i + c / 2) * 4 + 2 * half + c % 2] * factor;
      row[i * 4] = pack_vector<BFLOAT16>(x);
    }
  }
}

// One warpgroup's rows of a work. A page's scores are multiplied and weighed while the values of
// the page before are.
DEVICE void attend(const Arguments& arguments, const Shared& shared, const Work& work, Ring& keys,
                   Ring& values) {
  const Rows rows(work);
  uint32 query[OUTPUTS / 2], weights[SCORES / 2];
  float scores[SCORES], outputs[OUTPUTS];
  Softmax softmax;
  load_query(query, arguments.q, rows);
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++) outputs[i] = 0;

  auto weigh = [&](int page) {
    const int first = page * PAGE_TOKENS;
    pin(scores);
    if (first + PAGE_TOKENS > work.tile.first_position + 1 ||
        first <= work.last_position() - arguments.window)
      hide(scores, rows, first, arguments.window);
    softmax.weigh(scores, arguments.unit);
  };
  auto start_values = [&] {
    barrier_wait(shared.full(VALUES, values.stage), values.phase);
    multiply_values(outputs, weights, shared.tile(VALUES, values.stage));
  };
  auto finish_values = [&] {
    wgmma_wait<0>();
    pin(outputs);
    warp_arrive(shared.empty(VALUES, values.stage));
    values.advance();
  };
  auto start_keys = [&] {
    barrier_wait(shared.full(KEYS, keys.stage), keys.phase);
    multiply_keys(scores, query, shared.tile(KEYS, keys.stage));
  };
  auto release_keys = [&] {
    warp_arrive(shared.empty(KEYS, keys.stage));
    keys.advance();
  };

  start_keys();
  wgmma_wait<0>();
  release_keys();
  weigh(work.first_page);
  pack(weights, scores);
#pragma unroll 1
  for (int page = work.first_page + 1; page < work.end_page; page++) {
    start_keys();
    start_values();
    wgmma_wait<1>();
    release_keys();
    weigh(page);
    finish_values();
    softmax.rescale(outputs);
    pack(weights, scores);
  }
  start_values();
  finish_values();
  store_outputs(arguments.out, outputs, softmax, rows);
}

extern __shared__ uint8 shared_memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention(const Arguments arguments) {
  const Shared shared(round_up(shared_address(shared_memory), 1024));
  if (threadIdx.x == 0) shared.init();
  publish_barriers();
  launch_dependents();
  wait_for_predecessor();
  if (warp_index() < CONSUMER_WARPS) {
    take_registers<192>();
    Schedule schedule(arguments);
    Ring keys, values;
    for (Work work; schedule.pop(work);) attend(arguments, shared, work, keys, values);
  } else {
    give_registers<120>();
    produce(arguments, shared);
  }
}
