// Draws a token for every row of logits. A block per row reads it a few times and keeps nothing of
// it: shares are worked out anew in every pass. They are integers, so no sum depends on the order
// in which it is added up.
#include "half.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int BATCH = 8;  // loads of a thread in flight
constexpr int BINS = 1 << DIGIT_BITS;
constexpr int LARGEST_SHARE = (1 << SHARE_BITS) - 1;
constexpr float LARGEST_FLOAT = 3.402823466e38f;
static_assert(SHARE_BITS % DIGIT_BITS == 0, "a share is looked at digit by digit");

struct Draw {  // kernels/draw.py says what they mean
  double noise, top_p, min_p;
  float temperature;
  int top_k;
};

struct Arguments {
  const Logit* logits;  // [rows, vocab]
  const Draw* draws;    // [rows]
  int64* token_ids;     // [rows]
  int vocab;
};

struct Shared {
  uint64 sums[WARPS];
  uint32 low[BINS], high[BINS];  // of one sum of 64 bits per bin
  float maxima[WARPS];
};

extern __shared__ uint8 shared_memory[];

DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory); }

DEVICE float to_float(float logit) { return logit; }
DEVICE float to_float(uint16 logit) { return unpack_pair<BFLOAT16>(logit).x; }

DEVICE uint64 warp_sum(uint64 value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(FULL_WARP, value, lane);
  return value;
}

DEVICE float block_max(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, lane));
  if (threadIdx.x % 32 == 0) shared().maxima[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < WARPS; warp++) value = fmaxf(value, shared().maxima[warp]);
  return value;
}

struct Row {
  const Logit* logits;
  int vocab;
  bool greedy;
  float inverse_temperature, largest;

  __device__ __forceinline__ Row(const Arguments& arguments, float temperature)
      : logits(arguments.logits + int64(blockIdx.x) * arguments.vocab),
        vocab(arguments.vocab),
        greedy(temperature == 0),
        inverse_temperature(fminf(__fdiv_rn(1.0f, temperature), LARGEST_FLOAT)) {
    float own = minus_infinity();
    each(threadIdx.x, vocab, THREADS, [&](float logit) { own = fmaxf(own, logit); });
    largest = block_max(own);
  }

  // `body(logit)` for the logits at first, first + stride, ... before `end`, and a few times for
  // minus infinity.
  template <class Body>
  __device__ __forceinline__ void each(int first, int end, int stride, Body body) const {
#pragma unroll 1
    for (int batch = first; batch < end; batch += BATCH * stride) {
      float values[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        const int at = batch + i * stride;
        values[i] = at < end ? to_float(__ldg(logits + at)) : minus_infinity();
      }
#pragma unroll
      for (int i = 0; i < BATCH; i++) body(values[i]);
    }
  }

  // In units of 2^-SHARE_BITS of the likeliest token's probability; of no number, none.
  __device__ __forceinline__ uint32 share(float logit) const {
    if (greedy) return logit == largest;
    const float weight = expf(__fmul_rn(__fsub_rn(logit, largest), inverse_temperature));
    return min(__float2int_rn(weight * (1 << SHARE_BITS)), LARGEST_SHARE);
  }
};

struct Found {
  int item;
  uint64 threshold;  // less the items before it
};

// The first of `length` items at which their running sum exceeds `threshold_of(sum of all)`, or the
// last one. `sum(begin, end)`: this lane's part of the sum of some items. Every warp adds up a part
// of the items; the search goes on in the part where the threshold is passed.
template <class Sum, class Threshold>
DEVICE Found find(int length, Sum sum, Threshold threshold_of) {
  uint64(&sums)[WARPS] = shared().sums;
  const int warp = warp_index();
  uint64 threshold = 0;
  int start = 0;
#pragma unroll 1
  for (bool first = true; first || length > 1; first = false) {
    const int part = (length + WARPS - 1) / WARPS;
    const int begin = min(warp * part, length), end = min(begin + part, length);
    const uint64 own = warp_sum(sum(start + begin, start + end));
    __syncthreads();  // the sums of the round before have been read
    if (threadIdx.x % 32 == 0) sums[warp] = own;
    __syncthreads();
    if (first) {
      uint64 total = 0;
      for (int i = 0; i < WARPS; i++) total += sums[i];
      threshold = threshold_of(total);
    }
    int before = 0;
    for (int i = 0; before + part < length && threshold >= sums[i]; i++, before += part)
      threshold -= sums[i];
    start += before;
    length = min(part, length - before);
  }
  return {start, threshold};
}

DEVICE void add_to_bin(int bin, uint64 amount) {
  const uint32 low = uint32(amount), before = atomicAdd(&shared().low[bin], low);
  const uint32 carry = before + low < before, high = uint32(amount >> 32) + carry;
  if (high != 0) atomicAdd(&shared().high[bin], high);
}

// Adds up `amount(share)` of the shares from `least` on whose digits before this one are `prefix`,
// in a bin for each value of the digit that begins at bit `shift`. Most shares are small: what
// belongs to bin 0 is added up by each thread first.
template <class Amount>
DEVICE void fill_bins(const Row& row, uint32 least, uint32 prefix, int shift, Amount amount) {
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
    shared().low[bin] = 0, shared().high[bin] = 0;
  __syncthreads();
  uint64 lowest = 0;
  row.each(threadIdx.x, row.vocab, THREADS, [&](float logit) {
    const uint32 share = row.share(logit), digit = (share >> shift) % BINS;
    if (share == 0 || share < least || share >> shift >> DIGIT_BITS != prefix) return;
    if (digit == 0)
      lowest += amount(share);
    else
      add_to_bin(digit, amount(share));
  });
  lowest = warp_sum(lowest);
  if (threadIdx.x % 32 == 0) add_to_bin(0, lowest);
  __syncthreads();
}

// The largest share such that the amounts of the shares from there on, but none below `least`,
// exceed `threshold_of(sum of all amounts)`; 0 if none does.
template <class Amount, class Threshold>
DEVICE uint32 find_share(const Row& row, uint32 least, Amount amount, Threshold threshold_of) {
  const auto sum = [](int begin, int end) {  // from the last bin on
    uint64 sum = 0;
    for (int item = begin + threadIdx.x % 32; item < end; item += 32) {
      const int bin = BINS - 1 - item;
      sum += uint64(shared().high[bin]) << 32 | shared().low[bin];
    }
    return sum;
  };
  constexpr int FIRST = SHARE_BITS - DIGIT_BITS;
  uint32 prefix = 0;
  uint64 rest = 0;
#pragma unroll 1
  for (int shift = FIRST; shift >= 0; shift -= DIGIT_BITS) {
    fill_bins(row, least, prefix, shift, amount);
    const Found found = find(
        BINS, sum, [&](uint64 total) { return shift == FIRST ? threshold_of(total) : rest; });
    prefix = prefix << DIGIT_BITS | (BINS - 1 - found.item);
    rest = found.threshold;
  }
  return prefix;
}

// What the filters leave is what has at least this share.
DEVICE uint32 least_share(const Row& row, const Draw& draw) {
  uint32 least = 0;
  if (draw.top_k > 0)
    least = find_share(
        row, least, [](uint32) { return 1u; }, [&](uint64) { return uint64(draw.top_k - 1); });
  if (draw.top_p < 1)
    least = find_share(
        row, least, [](uint32 share) { return share; },
        [&](uint64 total) { return uint64(ceil(draw.top_p * double(total))) - 1; });
  return max(least, uint32(ceil(draw.min_p * LARGEST_SHARE)));
}

extern "C" __global__ void __launch_bounds__(THREADS) draw_tokens(const Arguments arguments) {
  const Draw draw = arguments.draws[blockIdx.x];
  const Row row(arguments, draw.temperature);
  const uint32 least = row.greedy ? 0 : least_share(row, draw);
  const double noise = row.greedy ? 0 : draw.noise;
  const auto sum = [&](int begin, int end) {
    uint64 sum = 0;
    row.each(begin + threadIdx.x % 32, end, 32, [&](float logit) {
      const uint32 share = row.share(logit);
      sum += share >= least ? share : 0;
    });
    return sum;
  };
  const Found found =
      find(row.vocab, sum, [&](uint64 total) { return uint64(noise * double(total)); });
  if (threadIdx.x == 0) arguments.token_ids[blockIdx.x] = found.item;
}
