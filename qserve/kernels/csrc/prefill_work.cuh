// The work of prefill attention: tiles of queries, each for one KV head, and a block's walk through
// their pages.
#pragma once
#include "kv_page.cuh"

constexpr int TILE_ROWS = 128;  // queries of neighbouring positions times the heads of one KV head

struct Tile {
  int sequence, first_query, first_position, queries;
};

struct Arguments {
  const uint16* q;  // [T, KV_HEADS * GROUP, HEAD_DIM]
  const uint8* pool;
  const int* page_table;
  const int* tiles;  // as `Tile`, those with most pages first
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

  // Whether there is a next work; which.
  __device__ __forceinline__ bool peek(Work& work) const {
    if (index_ >= arguments_.works) return false;
    work.tile = {field(0), field(1), field(2), field(3)};
    work.head = index_ % KV_HEADS;
    work.first_page = max(work.tile.first_position - arguments_.window + 1, 0) / PAGE_TOKENS;
    work.end_page = work.last_position() / PAGE_TOKENS + 1;
    return true;
  }

  __device__ __forceinline__ bool pop(Work& work) {
    if (!peek(work)) return false;
    load();
    return true;
  }

 private:
  __device__ __forceinline__ void load() {
    const int blocks = gridDim.x, block = blockIdx.x;
    index_ = round_ * blocks + (round_ % 2 ? blocks - 1 - block : block);
    round_++;
    if (index_ < arguments_.works)
      loaded_ = __ldg(arguments_.tiles + index_ / KV_HEADS * 4 + threadIdx.x % 4);
  }

  __device__ __forceinline__ int field(int i) const {
    return __shfl_sync(FULL_WARP, loaded_, i);
  }

  const Arguments& arguments_;
  int index_, round_ = 0;
  int loaded_;  // a field of the next work's tile, so that nobody waits for it yet
};

// The pages of a block's works, one after the other.
class Walk {
 public:
  __device__ __forceinline__ explicit Walk(const Arguments& arguments) : schedule_(arguments) {
    enter();
  }

  __device__ __forceinline__ bool done() const { return done_; }
  __device__ __forceinline__ const Work& work() const { return work_; }
  __device__ __forceinline__ int page() const { return page_; }
  __device__ __forceinline__ bool at_first_page() const { return page_ == work_.first_page; }
  __device__ __forceinline__ bool at_last_page() const { return page_ + 1 == work_.end_page; }
  __device__ __forceinline__ bool peek(Work& next) const { return schedule_.peek(next); }

  __device__ __forceinline__ void advance() {
    if (++page_ == work_.end_page) enter();
  }

 private:
  __device__ __forceinline__ void enter() {
    done_ = !schedule_.pop(work_);
    page_ = work_.first_page;
  }

  Schedule schedule_;
  Work work_;
  int page_;
  bool done_;
};
