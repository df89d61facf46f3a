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

constexpr int PARTS = 8;  // of splits, on their way together

// Eight channels of one head, over the splits so far.
struct Combined {
  float maximum = minus_infinity(), weights = 0;
  float sum[WIDTH] = {};

  __device__ __forceinline__ void shrink_to(float higher) {
    const float factor = power_of_two(maximum - higher);
    maximum = higher, weights *= factor;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sum[i] *= factor;
  }

  // The next `splits` splits' parts and (maximum, weights), at most PARTS of them.
  __device__ __forceinline__ void add(const float4* part, const float2* sums, int splits) {
    float4 low[PARTS], high[PARTS];
    float2 own[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int split = min(i, splits - 1) * QUERY_HEADS;
      low[i] = part[split * (HEAD_DIM / 4)], high[i] = part[split * (HEAD_DIM / 4) + 1];
    }
#pragma unroll
    for (int i = 0; i < PARTS; i++) own[i] = sums[min(i, splits - 1) * QUERY_HEADS];
    float higher = maximum;
#pragma unroll
    for (int i = 0; i < PARTS; i++) higher = fmaxf(higher, own[i].x);
    shrink_to(higher);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const float share = i < splits ? power_of_two(own[i].x - maximum) : 0.0f;
      const float values[WIDTH] = {low[i].x,  low[i].y,  low[i].z,  low[i].w,
                                   high[i].x, high[i].y, high[i].z, high[i].w};
      weights = fmaf(share, own[i].y, weights);
#pragma unroll
      for (int j = 0; j < WIDTH; j++) sum[j] = fmaf(share, values[j], sum[j]);
    }
  }
};

// out: vector `vector` of the block's heads, whose first split's parts and sums are given.
DEVICE void combine(float (&out)[WIDTH], const float* partials, const float2* sums, int splits,
                    int vector) {
  const float4* part = reinterpret_cast<const float4*>(partials) + vector * 2;
  const float2* own_sums = sums + vector * WIDTH / HEAD_DIM;
  Combined combined;
  for (int split = 0; split < splits; split += PARTS)
    combined.add(part + split * (QUERY_HEADS * HEAD_DIM / 4), own_sums + split * QUERY_HEADS,
                 splits - split);
  const float norm = 1.0f / combined.weights;
#pragma unroll
  for (int i = 0; i < WIDTH; i++) out[i] = combined.sum[i] * norm;
}

// With one block per SM asked for, the compiler leaves the loads of `add` together.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_combine(const Arguments arguments) {
  const int sequence = blockIdx.x, first_head = blockIdx.y * HEADS;
  const int splits = arguments.splits[sequence];
  const int64 row = arguments.query_start[sequence];
  launch_dependents();
  wait_for_predecessor();
  if (!QUANTIZE && splits <= 1) return;
  uint16* out = arguments.out + (row * QUERY_HEADS + first_head) * HEAD_DIM;
  const int64 first =
      static_cast<int64>(sequence) * arguments.max_splits * QUERY_HEADS + first_head;
  Values values;
  values.each([&](int vector, float(&v)[WIDTH]) {
    if (splits <= 1) return load_vector(v, out, vector);
    combine(v, arguments.partials + first * HEAD_DIM, arguments.partial_sums + first, splits, vector);
    if (QUANTIZE)
      unpack_vector<BFLOAT16>(pack_vector<BFLOAT16>(v), v);
    else
      store_vector(out, vector, v);
  });
  if constexpr (QUANTIZE) quantize_row(values, arguments.quantized, row);
}
