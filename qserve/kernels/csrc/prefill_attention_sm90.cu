// Causal attention of prompt chunks over quantized pages on Hopper, without a workspace.
//
// A block takes one tile of up to 128 rows after the other. Four warps dequantize each page of it
// once, into a ring of tiles in shared memory (`prefill_page.cuh`); two warpgroups multiply them by
// 64 rows each. A page's scores, and their online softmax, overlap with the values of the page
// before, and with the other warpgroup.
//
// A row's result depends on its own query and on the keys that it sees: pages come in order of
// their absolute position, what a row does not see adds exact zeros, and when the reference of its
// softmax moves depends on this row only. Products are of float16 operands, with float32 sums.
#include "barrier.cuh"
#include "half.cuh"
#include "prefill_page.cuh"
#include "prefill_work.cuh"

constexpr int CONSUMER_WARPS = 8, PRODUCER_WARPS = 4;
constexpr int PRODUCER_THREADS = PRODUCER_WARPS * 32;
constexpr int THREADS = CONSUMER_WARPS * 32 + PRODUCER_THREADS;
constexpr int SCORES = PAGE_TOKENS / 2;  // of one thread: two rows
constexpr int OUTPUTS = HEAD_DIM / 2;
constexpr int STEP = 16;                 // channels or tokens of one multiply, rows of a warp
constexpr int TILES_BYTES = 2 * STAGES * TILE_BYTES;
constexpr int QUERY_BYTES = TILE_ROWS * HEAD_DIM * 2;
static_assert(1024 + TILES_BYTES + QUERY_BYTES + 4 * STAGES * 8 <= SHARED_BYTES,
              "the launch gives too little shared memory");

// Weights are 2^(score - reference). A row's reference is HEADROOM below the largest score of the
// first page that it sees, and is raised to be so again once a score exceeds it by more than
// HEADROOM + SLACK. That is rare, so it is found out afterwards: no maximum lies on the usual path.
constexpr float HEADROOM = 5.0f, SLACK = 8.0f;
constexpr float UNSET = -1e30f;
constexpr float SUSPICIOUS = 4096.0f;  // sum of weights, with a margin: 2^(HEADROOM + SLACK - 1)

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
  uint32 tiles, queries, barriers;

  __device__ __forceinline__ explicit Shared(uint32 base)
      : tiles(base), queries(base + TILES_BYTES), barriers(queries + QUERY_BYTES) {}
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

// The pages of a block's works, one after the other. A page's id is loaded a page ahead; once it is
// popped, its block is on its way to the L2 cache.
class Pages {
 public:
  __device__ __forceinline__ explicit Pages(const Arguments& arguments)
      : arguments_(arguments), schedule_(arguments) {
    open();
    load_next();
  }

  __device__ __forceinline__ bool pop(Source& source) {
    if (!more_) return false;
    source = next_;
    if (threadIdx.x % PRODUCER_THREADS == 0) prefetch(source.block(arguments_), BLOCK_BYTES);
    load_next();
    return true;
  }

 private:
  __device__ __forceinline__ void load_next() {
    more_ = open_;
    if (!open_) return;
    const int64 row = static_cast<int64>(work_.tile.sequence) * arguments_.table_width;
    next_.id = __ldg(arguments_.page_table + row + page_);
    next_.head = work_.head;
    next_.tokens = work_.last_position() + 1 - page_ * PAGE_TOKENS;
    if (++page_ == work_.end_page) open();
  }

  __device__ __forceinline__ void open() {
    open_ = schedule_.pop(work_);
    page_ = work_.first_page;
  }

  const Arguments& arguments_;
  Schedule schedule_;
  Source next_;
  Work work_;
  int page_;
  bool more_, open_;
};

template <class HalfCodes>
DEVICE void put(HalfCodes& codes, const Shared& shared, Half half, const Ring& ring) {
  barrier_wait(shared.empty(half, ring.stage), ring.phase ^ 1);
  codes.store(shared.tile(half, ring.stage));
  fence_for_copy_engine();  // the multiplies read by the same path
  warp_arrive(shared.full(half, ring.stage));
}

// Codes are loaded one page ahead.
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

// One of a warp's 16 rows. Those past the last query repeat it.
struct Row {
  int64 offset;  // of the head's channels in q and in out
  int position;
  bool valid;

  __device__ __forceinline__ Row(const Work& work, int row_of_warp) {
    int row = threadIdx.x / 32 * STEP + row_of_warp;
    pin(row);
    const int query = min(row / GROUP, work.tile.queries - 1);
    const int64 token = work.tile.first_query + query;
    offset = ((token * KV_HEADS + work.head) * GROUP + row % GROUP) * HEAD_DIM;
    position = work.tile.first_position + query;
    valid = row / GROUP < work.tile.queries;
  }
};

// Where channels 8 chunk .. 8 chunk + 7 of one of a warp's rows lie, spread over the banks.
DEVICE uint32 query_address(const Shared& shared, int row, int chunk) {
  return shared.queries + (threadIdx.x / 32 * STEP + row) * HEAD_DIM * 2 +
         (chunk ^ row % 4 * 2) * 16;
}

// A warp's rows of a work on their way to shared memory.
DEVICE void fetch_queries(const Arguments& arguments, const Shared& shared, const Work& work) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < STEP * CHUNKS; i += 32) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const uint16* source = arguments.q + Row(work, row).offset + chunk * CHUNK;
    copy_async_16(query_address(shared, row, chunk), source, true);
  }
  copy_async_commit();
}

DEVICE uint32 to_float16(uint32 pair) {
  if (!BFLOAT16) return pair;
  const float2 v = unpack_pair<true>(pair);
  return pack_pair<false>(v.x, v.y);
}

DEVICE void load_query(uint32 (&query)[OUTPUTS / 2], const Shared& shared) {
  const int lane = threadIdx.x % 32;
  copy_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int step = 0; step < HEAD_DIM / STEP; step++) {
      const uint2 v = load_shared_8(
          query_address(shared, lane / 4 + half * 8, step * 2 + lane % 4 / 2) + lane % 2 * 8);
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
DEVICE void hide(float (&scores)[SCORES], const Work& work, int first_token, int window) {
  if (first_token + PAGE_TOKENS <= work.tile.first_position + 1 &&
      first_token > work.last_position() - window)
    return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Row row(work, threadIdx.x % 32 / 4 + half * 8);
    const int newest = row.position - first_token - threadIdx.x % 4;
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
  float reference[2] = {UNSET, UNSET}, sum[2] = {};

  // What the row's reference should be for these scores.
  static __device__ __forceinline__ float wanted(const float (&scores)[SCORES], int half,
                                                 float unit) {
    float largest = minus_infinity();
#pragma unroll
    for (int i = 2 * half; i < SCORES; i += 4)
      largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
    return largest_of_row(largest) * unit - HEADROOM;
  }

  // References of rows that see their first keys.
  __device__ __forceinline__ void open(const float (&scores)[SCORES], float unit) {
    if (!__any_sync(FULL_WARP, reference[0] == UNSET || reference[1] == UNSET)) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float next = wanted(scores, half, unit);
      if (reference[half] == UNSET && next > UNSET + SLACK) reference[half] = next;
    }
  }

  // Takes a page's weights into the sums; they may be found to be too large.
  __device__ __forceinline__ void weigh(float (&weights)[SCORES], const float (&scores)[SCORES],
                                        float unit) {
#pragma unroll
    for (int i = 0; i < SCORES; i++) {
      weights[i] = power_of_two(fmaf(scores[i], unit, -reference[i / 2 % 2]));
      sum[i / 2 % 2] += weights[i];
    }
  }

  // Whether the latest weights may be too large: of any row of the warp whose reference is to be
  // raised, they are.
  __device__ __forceinline__ bool exceeds(const Softmax& before) const {
    return __any_sync(FULL_WARP, !(sum[0] - before.sum[0] < SUSPICIOUS) ||
                                     !(sum[1] - before.sum[1] < SUSPICIOUS));
  }

  // Raises references that are SLACK below what they should be.
  __device__ __forceinline__ void raise(float (&outputs)[OUTPUTS], const float (&scores)[SCORES],
                                        float unit) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float next = wanted(scores, half, unit);
      if (next > reference[half] + SLACK) {
        const float shrink = power_of_two(reference[half] - next);
        reference[half] = next;
        sum[half] *= shrink;
#pragma unroll
        for (int i = 2 * half; i < OUTPUTS; i += 4) outputs[i] *= shrink, outputs[i + 1] *= shrink;
      }
    }
  }
};

DEVICE void pack(uint32 (&weights)[SCORES / 2], const float (&scores)[SCORES]) {
#pragma unroll
  for (int i = 0; i < SCORES / 2; i++)
    weights[i] = pack_pair<false>(scores[2 * i], scores[2 * i + 1]);
}

// Leaves zeros.
DEVICE void store_outputs(uint16* out, float (&outputs)[OUTPUTS], const Softmax& softmax,
                          const Work& work) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float factor = 1.0f / sum_of_row(softmax.sum[half]);
    const Row row(work, threadIdx.x % 32 / 4 + half * 8);
    uint4* channels = reinterpret_cast<uint4*>(out + row.offset + threadIdx.x % 4 * 8);
    if (!row.valid) continue;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      float x[8];
#pragma unroll
      for (int c = 0; c < 8; c++) x[c] = outputs[(4 * i + c / 2) * 4 + 2 * half + c % 2] * factor;
      channels[i * 4] = pack_vector<BFLOAT16>(x);
    }
  }
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++) outputs[i] = 0;
}

// What a warpgroup does: its rows of one work after the other. A page's scores are multiplied and
// weighed while the values of the page before are, also where that is another work's.
class Attention {
 public:
  __device__ __forceinline__ Attention(const Arguments& arguments, const Shared& shared)
      : arguments_(arguments), shared_(shared), walk_(arguments) {}

  __device__ __forceinline__ void run() {
    if (walk_.done()) return;
    start();
#pragma unroll 1
    while (!walk_.done()) step();
    start_outputs();
    wgmma_wait<0>();
    finish_outputs();
    store_outputs(arguments_.out, outputs_, softmax_, done_);
  }

 private:
  // The first page, until its weights are known.
  __device__ __forceinline__ void start() {
    fetch_queries(arguments_, shared_, walk_.work());
    load_query(query_, shared_);
    start_scores();
    wgmma_wait<0>();
    finish_scores();
    softmax_.weigh(weights_, scores_, arguments_.unit);
    pack(operand_, weights_);
    done_ = walk_.work();
    walk_.advance();
  }

  // The values of the last page, and the weights of this one.
  __device__ __forceinline__ void step() {
    start_scores();
    start_outputs();
    wgmma_wait<1>();
    const Softmax before = softmax_;
    const bool fresh = walk_.at_first_page();
    if (fresh) softmax_ = Softmax();
    finish_scores();
    const Softmax lower = softmax_;
    softmax_.weigh(weights_, scores_, arguments_.unit);
    // Different waits, so that the compiler finds the weights before it.
    if (fresh) {
      wgmma_wait<0, 2>();
      pin(outputs_);
      pack(operand_, weights_);
      store_outputs(arguments_.out, outputs_, before, done_);
      done_ = walk_.work();
    } else if (softmax_.exceeds(lower)) {
      wgmma_wait<0>();
      pin(outputs_);
      softmax_ = lower;
      softmax_.raise(outputs_, scores_, arguments_.unit);
      softmax_.weigh(weights_, scores_, arguments_.unit);
      pack(operand_, weights_);
    } else {
      wgmma_wait<0, 1>();
      pin(outputs_);
      pack(operand_, weights_);
    }
    finish_outputs();
    walk_.advance();
  }

  __device__ __forceinline__ void start_scores() {
    barrier_wait(shared_.full(KEYS, keys_.stage), keys_.phase);
    multiply_keys(scores_, query_, shared_.tile(KEYS, keys_.stage));
  }

  __device__ __forceinline__ void finish_scores() {
    pin(scores_);
    warp_arrive(shared_.empty(KEYS, keys_.stage));
    keys_.advance();
    Work next;
    if (walk_.at_first_page() && walk_.peek(next)) fetch_queries(arguments_, shared_, next);
    if (walk_.at_last_page()) load_query(query_, shared_);
    hide(scores_, walk_.work(), walk_.page() * PAGE_TOKENS, arguments_.window);
    softmax_.open(scores_, arguments_.unit);
  }

  __device__ __forceinline__ void start_outputs() {
    barrier_wait(shared_.full(VALUES, values_.stage), values_.phase);
    multiply_values(outputs_, operand_, shared_.tile(VALUES, values_.stage));
  }

  __device__ __forceinline__ void finish_outputs() {
    pin(outputs_);
    warp_arrive(shared_.empty(VALUES, values_.stage));
    values_.advance();
  }

  const Arguments& arguments_;
  const Shared& shared_;
  Walk walk_;
  Work done_;  // whose outputs these are
  Softmax softmax_;
  Ring keys_, values_;
  uint32 query_[OUTPUTS / 2], operand_[SCORES / 2];
  float scores_[SCORES], weights_[SCORES], outputs_[OUTPUTS] = {};
};

extern __shared__ uint8 shared_memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention(const Arguments arguments) {
  const Shared shared(
      __shfl_sync(FULL_WARP, round_up(shared_address(shared_memory), 1024), 0));  // one for a warp
  if (threadIdx.x == 0) shared.init();
  publish_barriers();
  launch_dependents();
  wait_for_predecessor();
  if (warp_index() < CONSUMER_WARPS) {
    take_registers<192>();
    Attention(arguments, shared).run();
  } else {
    give_registers<120>();
    produce(arguments, shared);
  }
}
