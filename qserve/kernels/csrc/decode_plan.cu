// The work list of a step: every sequence that has one query, split into pieces of at most
// SPLIT_PAGES pages (of more only where that would make more than MAX_SPLITS), largest first, with
// the ids of their first SPLIT_PAGES pages. One block.
#include "work_item.cuh"

constexpr int THREADS = 1024;
constexpr int BINS = 128;  // a split's pages, larger ones together

struct Arguments {
  const int* context_lens;
  const int* query_start;
  const int* page_table;
  WorkItem* items;
  int* page_ids;
  int* item_count;
  int* splits;
  int sequences, table_width, window;  // window: tokens seen, 0 for all
};

// How one sequence's pages are divided.
struct Division {
  int begin, end, first_page, pages, splits, size;

  __device__ __forceinline__ Division(const Arguments& arguments, int sequence) {
    end = arguments.context_lens[sequence];
    begin = arguments.window ? max(0, end - arguments.window) : 0;
    first_page = begin / PAGE_TOKENS;
    pages = (end + PAGE_TOKENS - 1) / PAGE_TOKENS - first_page;
    const int limit = max(SPLIT_PAGES, (pages + MAX_SPLITS - 1) / MAX_SPLITS);
    const bool decodes = arguments.query_start[sequence + 1] - arguments.query_start[sequence] == 1;
    splits = decodes ? max(1, (pages + limit - 1) / limit) : 0;
    size = decodes ? (pages + splits - 1) / splits : 0;
  }

  __device__ __forceinline__ int pages_of(int split) const {
    return min(size, pages - split * size);
  }
  __device__ __forceinline__ int bin_of(int split) const {
    return BINS - 1 - min(pages_of(split), BINS - 1);
  }
};

// counts become the numbers of items in earlier bins; returns the number of all (to every lane).
DEVICE int scan_bins(int (&counts)[BINS]) {
  const int lane = threadIdx.x, each = BINS / 32;
  int own = 0;
  for (int i = 0; i < each; i++) own += counts[lane * each + i];
  int upto = own;
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(FULL_WARP, upto, step);
    if (lane >= step) upto += before;
  }
  int start = upto - own;
  for (int i = 0; i < each; i++) {
    const int count = counts[lane * each + i];
    counts[lane * each + i] = start, start += count;
  }
  return __shfl_sync(FULL_WARP, upto, 31);
}

// Past an item's last page, that page's id.
DEVICE void copy_page_ids(const Arguments& arguments) {
  const int count = *arguments.item_count * SPLIT_PAGES;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const WorkItem& item = arguments.items[i / SPLIT_PAGES];
    const int page = item.first_page + max(0, min(i % SPLIT_PAGES, item.pages - 1));
    const int64 row = static_cast<int64>(item.sequence) * arguments.table_width;
    arguments.page_ids[i] = arguments.page_table[row + page];
  }
}

__shared__ int bins[BINS];

extern "C" __global__ void __launch_bounds__(THREADS) decode_plan(const Arguments arguments) {
  if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
  __syncthreads();
  for (int sequence = threadIdx.x; sequence < arguments.sequences; sequence += THREADS) {
    const Division division(arguments, sequence);
    for (int split = 0; split < division.splits; split++)
      atomicAdd(&bins[division.bin_of(split)], 1);
    arguments.splits[sequence] = division.splits;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int count = scan_bins(bins);
    if (threadIdx.x == 0) *arguments.item_count = count;
  }
  __syncthreads();
  for (int sequence = threadIdx.x; sequence < arguments.sequences; sequence += THREADS) {
    const Division division(arguments, sequence);
    for (int split = 0; split < division.splits; split++) {
      const int place = atomicAdd(&bins[division.bin_of(split)], 1);
      arguments.items[place] = {sequence,
                                arguments.query_start[sequence],
                                division.first_page + split * division.size,
                                division.pages_of(split),
                                division.begin,
                                division.end,
                                split,
                                division.splits};
    }
  }
  __syncthreads();
  copy_page_ids(arguments);
}
