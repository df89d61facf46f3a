// Attention of one query per sequence over quantized pages. A block is WARPS readers, each of which
// works through whole pages, one warp that merges what the readers found of a piece of work, and one
// that fetches; they meet at barriers in shared memory, never all at once.
#include "decode_page.cuh"
#include "decode_schedule.cuh"
#include "page_ring.cuh"

constexpr int THREADS = (WARPS + 2) * 32;
constexpr int DEPOSIT_ROW = HEAD_DIM + 4;  // floats; the padding spreads heads over the banks
constexpr int QUERY_HEADS = KV_HEADS * GROUP;

struct Arguments {
  const uint16* q;
  const uint8* pool;
  const int* page_table;
  WorkList work;
  uint16* out;
  float* partials;       // [sequence, split, query head, HEAD_DIM] where there are several splits
  float2* partial_sums;  // (maximum, weights) of each
  int table_width, max_splits;
  float score_unit;
};

// What a reader found of a piece of work. It lies where the last of the reader's pages lay.
struct Deposit {
  float output[ROWS][DEPOSIT_ROW];
  float2 sums[ROWS];  // (maximum, weights)
};
static_assert(sizeof(Deposit) <= BLOCK_BYTES, "a deposit takes the place of a page");

struct Shared {
  uint8 pages[STAGES][BLOCK_BYTES];
  uint64 full[STAGES], deposited[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "STAGES is too large");

extern __shared__ uint8 shared_memory[];
DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory); }
DEVICE Deposit& deposit_at(int stage) { return *reinterpret_cast<Deposit*>(shared().pages[stage]); }

template <class T>
DEVICE uint32 address(const T& object) {
  return shared_address(&object);
}

DEVICE void init_barriers() {
  for (int i = threadIdx.x; i < STAGES; i += THREADS) {
    barrier_init(address(shared().full[i]), FETCHERS);
    barrier_init(address(shared().deposited[i]), ARRIVING_LANES);
    barrier_init(address(shared().empty[i]), ARRIVING_LANES);
  }
  publish_barriers();
}

// Into the reader's next stage, once it has given it back, and no sooner than IN_FLIGHT of its pages
// before have come: pages on their way share the memory, so that more of them would all come late.
DEVICE void fetch_page(const Arguments& arguments, int id, int kv_head,
                       const RingPosition& position) {
  const int64 block = static_cast<int64>(id) * KV_HEADS + kv_head;
  const RingPosition earlier = position.before(IN_FLIGHT * WARPS);
  barrier_wait(address(shared().full[earlier.stage]), earlier.phase);
  barrier_wait(address(shared().empty[position.stage]), position.phase ^ 1);
  fetch(address(shared().pages[position.stage]), arguments.pool + block * BLOCK_BYTES, BLOCK_BYTES,
        address(shared().full[position.stage]));
}

// A page for the reader of each lane's number, unless id is negative. Copies are a lane's each, at
// once (but for a checker, which takes such for one lane's), or the warp's, one after the other.
DEVICE void fetch_row(const Arguments& arguments, int id, int kv_head, RingPosition& position) {
  if (LANE_COPIES) {
    for (int turn = 0; turn < ARRIVING_LANES; turn++)
      if (id >= 0 && threadIdx.x % ARRIVING_LANES == turn)
        fetch_page(arguments, id, kv_head, position);
  } else {
    for (int lane = 0; lane < WARPS; lane++) {
      const RingPosition other = {__shfl_sync(FULL_WARP, position.stage, lane),
                                  __shfl_sync(FULL_WARP, position.phase, lane)};
      const int other_id = __shfl_sync(FULL_WARP, id, lane);
      if (other_id >= 0) fetch_page(arguments, other_id, kv_head, other);
    }
  }
  if (id >= 0) position.advance(WARPS);
}

// Pages of earlier steps are fetched before the preceding kernel, which may append to the newest
// page, has ended. A row of pages is one for every reader; rows follow each other, so that no reader
// waits for a page whose turn comes after one that waits for the reader.
DEVICE void fetch_pages(const Arguments& arguments) {
  const int lane = threadIdx.x % 32;
  RingPosition position = {lane, 0};
  for_each_work(arguments.work, [&](const Work& work, int turn) {
    const WorkItem& item = work.item;
    const int* ids = arguments.page_table +
                     static_cast<int64>(item.sequence) * arguments.table_width + item.first_page;
    const int newest = (item.end - 1) / PAGE_TOKENS - item.first_page;
    const int place = (lane + WARPS - turn) % WARPS;
    int ahead = work.page_id;
    for (int base = 0; base < item.pages; base += PAGES_AHEAD) {
      const int later = __ldg(ids + min(base + PAGES_AHEAD + lane, item.pages - 1));
      for (int row = 0; row < min(PAGES_AHEAD, item.pages - base); row += WARPS) {
        const int id = __shfl_sync(FULL_WARP, ahead, row + place);
        const bool own = lane < WARPS && base + row + place < item.pages;
        if (base + row + WARPS > newest) wait_for_predecessor();
        fetch_row(arguments, own ? id : -1, work.kv_head, position);
      }
      ahead = later;
    }
  });
}

// Leaves a reader's part of a piece of work for the merging warp.
DEVICE void leave(Attention& attention, Deposit& deposit) {
  const int group = threadIdx.x % 32 / 4, column = threadIdx.x % 4;
#pragma unroll
  for (int head = 0; head < 2; head++) {
    const int row = 2 * column + head;
    const float weights = reduce_sum(attention.weights[head]);
    const float offset = reduce_sum(attention.offsets[head]);
    if (row >= ROWS) continue;
    if (group == 0) deposit.sums[row] = {attention.maximum[head], weights};
#pragma unroll
    for (int i = 0; i < K_STEPS; i += 2) {
      const auto value = [&](int step, int odd) {
        return fmaf(attention.output[i + step][2 * odd + head],
                    odd ? CODE_UNIT * ODD_PAIR : CODE_UNIT, offset);
      };
      float4* channels = reinterpret_cast<float4*>(&deposit.output[row][16 * i + 4 * group]);
      *channels = {value(0, 0), value(0, 1), value(1, 0), value(1, 1)};
    }
  }
  return_to_copies();
}

DEVICE void attend(const Arguments& arguments, int reader) {
  RingPosition position = {reader, 0};
  const bool arrives = threadIdx.x % 32 < ARRIVING_LANES;
  for_each_work(arguments.work, [&](const Work& work, int turn) {
    const WorkItem& item = work.item;
    const int first = (reader + WARPS - turn) % WARPS;
    if (first >= item.pages) return;
    Query query;
    wait_for_predecessor();  // the work list is older
    const int64 head = static_cast<int64>(item.row) * QUERY_HEADS + work.query_head();
    query.load(arguments.q + head * HEAD_DIM, work.rows(), arguments.score_unit);
    Attention attention;
    attention.reset();
    for (int page = first; page < item.pages; page += WARPS) {
      const int token = (item.first_page + page) * PAGE_TOKENS;
      const bool last = page + WARPS >= item.pages;
      const int stage = position.stage;
      barrier_wait(address(shared().full[stage]), position.phase);
      attend_page(attention, address(shared().pages[stage]), item.begin - token, item.end - token,
                  query);
      __syncwarp();
      if (last) leave(attention, deposit_at(stage));
      __syncwarp();
      if (arrives)
        barrier_arrive(address(last ? shared().deposited[stage] : shared().empty[stage]));
      position.advance(WARPS);
    }
  });
}

// Four channels of one head, over the readers that had pages, in the order of the pages.
struct Merged {
  float maximum = minus_infinity(), weights = 0;
  float4 output = {};

  // The first `count` parts.
  __device__ __forceinline__ Merged(const Deposit* const (&parts)[WARPS], int count, int row,
                                    int channel) {
#pragma unroll
    for (int part = 0; part < WARPS; part++)
      if (part < count) maximum = fmaxf(maximum, parts[part]->sums[row].x);
#pragma unroll
    for (int part = 0; part < WARPS; part++) {
      if (part >= count) continue;
      const float2 sums = parts[part]->sums[row];
      const float4 value = *reinterpret_cast<const float4*>(&parts[part]->output[row][channel]);
      const float share = power_of_two(sums.x - maximum);
      weights = fmaf(share, sums.y, weights);
      output.x = fmaf(share, value.x, output.x), output.y = fmaf(share, value.y, output.y);
      output.z = fmaf(share, value.z, output.z), output.w = fmaf(share, value.w, output.w);
    }
  }
};

DEVICE void store_merged(const Arguments& arguments, const WorkItem& item, int head, int channel,
                         const Merged& merged) {
  if (item.splits > 1) {
    const int64 part =
        (static_cast<int64>(item.sequence) * arguments.max_splits + item.split) * QUERY_HEADS +
        head;
    *reinterpret_cast<float4*>(arguments.partials + part * HEAD_DIM + channel) = merged.output;
    if (channel == 0) arguments.partial_sums[part] = {merged.maximum, merged.weights};
    return;
  }
  // Where there is no context, zeros.
  const float norm = merged.weights > 0 ? 1.0f / merged.weights : 0.0f;
  const float4 value = merged.output;
  uint16* target =
      arguments.out + (static_cast<int64>(item.row) * QUERY_HEADS + head) * HEAD_DIM + channel;
  *reinterpret_cast<uint2*>(target) = {pack_pair<BFLOAT16>(value.x * norm, value.y * norm),
                                       pack_pair<BFLOAT16>(value.z * norm, value.w * norm)};
}

// `body(stage, phases)` for the other lanes that have a stage, where each lane waits and arrives for
// itself.
template <class Body>
DEVICE void for_other_lanes(int has_stage, int stage, uint32 phases, Body body) {
  for (int i = 1; i < ARRIVING_LANES; i++) {
    const int lane = (threadIdx.x + i) % 32, other = __shfl_sync(FULL_WARP, stage, lane);
    const uint32 other_phases = __shfl_sync(FULL_WARP, phases, lane);
    if (__shfl_sync(FULL_WARP, has_stage, lane)) body(other, other_phases);
  }
}

// A lane waits for the deposit of the reader of its number, and gives its stage back.
DEVICE void merge(const Arguments& arguments) {
  const int lane = threadIdx.x % 32;
  RingPosition next = {lane, 0};  // the reader's
  uint32 phases = 0;              // bit s: the parity of the next deposit in its stage s
  wait_for_predecessor();
  for_each_work(arguments.work, [&](const Work& work, int turn) {
    const int pages = work.item.pages, first = (lane + WARPS - turn) % WARPS;
    const bool deposits = lane < WARPS && first < pages;
    int stage = 0;
    if (deposits) {
      for (int page = first; page < pages; page += WARPS) stage = next.stage, next.advance(WARPS);
      barrier_wait(address(shared().deposited[stage]), phases >> stage / WARPS & 1);
      phases ^= 1u << stage / WARPS;
    }
    for_other_lanes(deposits, stage, phases, [](int stage, uint32 phases) {
      barrier_wait(address(shared().deposited[stage]), ~phases >> stage / WARPS & 1);
    });
    const Deposit* parts[WARPS];
#pragma unroll
    for (int part = 0; part < WARPS; part++)
      parts[part] = &deposit_at(__shfl_sync(FULL_WARP, stage, (turn + part) % WARPS));
    for (int i = lane; i < work.rows() * HEAD_DIM / 4; i += 32) {
      const int row = i / (HEAD_DIM / 4), channel = i % (HEAD_DIM / 4) * 4;
      store_merged(arguments, work.item, work.query_head() + row, channel,
                   Merged(parts, min(pages, WARPS), row, channel));
    }
    __syncwarp();
    if (deposits) barrier_arrive(address(shared().empty[stage]));
    for_other_lanes(deposits, stage, phases, [](int stage, uint32) {
      barrier_arrive(address(shared().empty[stage]));
    });
  });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode_attention(const Arguments arguments) {
  init_barriers();
  launch_dependents();
  const int warp = warp_index();
  if (warp < WARPS)
    attend(arguments, warp);
  else if (warp == WARPS)
    merge(arguments);
  else
    fetch_pages(arguments);
}
