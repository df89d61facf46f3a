// Adds up the splits of long sequences. A block takes HEADS query heads of a sequence, a thread
// eight channels of one.
#include "half.cuh"

constexpr int WIDTH = 8;
constexpr int THREADS = HEADS * HEAD_DIM / WIDTH;

struct Arguments {
  const float* partials;
  const float2* partial_sums;
  const int* splits;
  const int* query_start;
  uint16* out;  // has the rows of sequences that were not split
  int max_splits;
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

// With one block per SM asked for, the compiler leaves the loads of `add` together.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_combine(const Arguments arguments) {
  const int sequence = blockIdx.x, splits = arguments.splits[sequence];
  const int head = blockIdx.y * HEADS + threadIdx.x / (HEAD_DIM / WIDTH);
  const int channel = threadIdx.x % (HEAD_DIM / WIDTH) * WIDTH;
  const int64 row = static_cast<int64>(arguments.query_start[sequence]) * QUERY_HEADS + head;
  launch_dependents();
  // One block at least waits, so that this kernel does not end before its predecessor.
  if (splits <= 1 && blockIdx.x + blockIdx.y > 0) return;
  wait_for_predecessor();
  if (splits <= 1) return;
  const int64 first = static_cast<int64>(sequence) * arguments.max_splits * QUERY_HEADS + head;
  const float4* parts =
      reinterpret_cast<const float4*>(arguments.partials + first * HEAD_DIM + channel);
  const float2* sums = arguments.partial_sums + first;
  Combined combined;
  for (int split = 0; split < splits; split += PARTS)
    combined.add(parts + split * (QUERY_HEADS * HEAD_DIM / 4), sums + split * QUERY_HEADS,
                 splits - split);
  const float norm = 1.0f / combined.weights;
#pragma unroll
  for (int i = 0; i < WIDTH; i++) combined.sum[i] *= norm;
  *reinterpret_cast<uint4*>(arguments.out + row * HEAD_DIM + channel) =
      pack_vector<BFLOAT16>(combined.sum);
}
