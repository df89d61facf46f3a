// The end of a decode step's attention: the splits of a sequence are added up, and if QUANTIZE the
// token's row becomes int8. A block takes HEADS query heads of a sequence; all, if QUANTIZE.
#include "quantize_row.cuh"

struct Arguments {
  const float* partials;
  const float2* partial_sums;
  const int* splits;
  const int* query_start;
  uint16* out;  // has the rows of sequences that were not split
  int max_splits;
  Quantized quantized;  // if QUANTIZE; every sequence then has one query
};

__shared__ float shares[HEADS][MAX_SPLITS];

// Lane s gets the share of split s in the whole.
DEVICE float share_of(float2 sums) {
  float maximum = sums.x;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(FULL_WARP, maximum, lane));
  const float share = power_of_two(sums.x - maximum);
  float total = share * sums.y;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) total += __shfl_xor_sync(FULL_WARP, total, lane);
  return share / total;
}

// first: the sequence's first split of the block's first head.
DEVICE void find_shares(const float2* first, int splits) {
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < HEADS; head += WARPS) {
    const float2 nothing = {minus_infinity(), 0.0f};
    shares[head][lane] = share_of(lane < splits ? first[lane * QUERY_HEADS + head] : nothing);
  }
  __syncthreads();
}

DEVICE void add_splits(float (&sum)[WIDTH], const float* first, int splits, int vector) {
  const int head = vector * WIDTH / HEAD_DIM;
  const float4* part = reinterpret_cast<const float4*>(first) + vector * 2;
#pragma unroll
  for (int i = 0; i < WIDTH; i++) sum[i] = 0;
#pragma unroll 8
  for (int split = 0; split < splits; split++) {
    const float4* values = part + split * (QUERY_HEADS * HEAD_DIM / 4);
    const float4 a = values[0], b = values[1];
    const float value[WIDTH] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    const float share = shares[head][split];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sum[i] = fmaf(share, value[i], sum[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) decode_combine(const Arguments arguments) {
  const int sequence = blockIdx.x, first_head = blockIdx.y * HEADS;
  const int splits = arguments.splits[sequence];
  const int64 row = arguments.query_start[sequence];
  launch_dependents();
  wait_for_predecessor();
  if (!QUANTIZE && splits <= 1) return;
  uint16* out = arguments.out + (row * QUERY_HEADS + first_head) * HEAD_DIM;
  const int64 first =
      static_cast<int64>(sequence) * arguments.max_splits * QUERY_HEADS + first_head;
  if (splits > 1) find_shares(arguments.partial_sums + first, splits);
  Values values;
  values.each([&](int vector, float(&v)[WIDTH]) {
    if (splits <= 1) return load_vector(v, out, vector);
    add_splits(v, arguments.partials + first * HEAD_DIM, splits, vector);
    if (QUANTIZE)
      unpack_vector<BFLOAT16>(pack_vector<BFLOAT16>(v), v);
    else
      store_vector(out, vector, v);
  });
  if constexpr (QUANTIZE) quantize_row(values, arguments.quantized, row);
}
