// Who computes what: the work list of one step, and each block's walk through it.
//
// A piece of work is one split of one sequence's pages for one tile of query heads. Splits depend
// on their own sequence alone, so results do not depend on the batch. The list is sorted by size;
// blocks take pieces in snake order, which gives every block nearly the same number of pages.
#pragma once
#include "work_item.cuh"

static_assert(SPLIT_PAGES == 32, "a lane has one of an item's first pages");

struct Work {
  WorkItem item;
  int kv_head, tile;  // the query heads are tile * ROWS .. of those that share kv_head
  int page_id;        // of the item's page of this lane's number

  __device__ __forceinline__ int rows() const {
    return TILES == 1 ? ROWS : min(ROWS, GROUP - tile * ROWS);
  }
  __device__ __forceinline__ int query_head() const { return kv_head * GROUP + tile * ROWS; }
};

DEVICE WorkItem load_item(const WorkItem* item) {
  const int4* halves = reinterpret_cast<const int4*>(item);
  const int4 first = __ldg(halves), second = __ldg(halves + 1);
  return {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
}

// The list has room for `capacity` items, of which the first *item_count are to be done.
struct WorkList {
  const WorkItem* items;
  const int* page_ids;  // SPLIT_PAGES of each item
  const int* item_count;
  int capacity;
};

// `body(work, turn)` for the block's pieces in order; the block's pages are dealt to its WARPS
// readers in turn, and a piece's first page is reader `turn`'s.
template <class Body>
DEVICE void for_each_work(const WorkList& list, Body body) {
  constexpr int HEADS = KV_HEADS * TILES;
  int turn = 0;
  for (int round = 0;; round++) {
    const int place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int piece = round * gridDim.x + place, head = piece % HEADS;
    // Loaded before it is known to be one, so that all loads are on their way together.
    const int index = min(piece / HEADS, list.capacity - 1);
    const WorkItem item = load_item(list.items + index);
    const int page_id = __ldg(list.page_ids + index * SPLIT_PAGES + threadIdx.x % 32);
    if (piece >= __ldg(list.item_count) * HEADS) return;
    body(Work{item, head / TILES, head % TILES, page_id}, turn);
    turn = (turn + item.pages) % WARPS;
  }
}
