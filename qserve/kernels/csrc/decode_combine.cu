// Adds up the splits of sequences that have several; a warp per sequence and query head.
#include "half.cuh"

constexpr int WARPS = 4;
constexpr int WIDTH = HEAD_DIM / 32;  // channels of a thread

struct Arguments {
  const float* partials;
  const float2* partial_sums;
  const int* splits;
  const int* query_start;
  uint16* out;
  int max_splits;
};

struct alignas(WIDTH * 4) Channels {
  float at[WIDTH];
};

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

extern "C" __global__ void __launch_bounds__(WARPS * 32) decode_combine(const Arguments arguments) {
  const int sequence = blockIdx.y, head = blockIdx.x * WARPS + threadIdx.x / 32,
            lane = threadIdx.x % 32;
  const int splits = arguments.splits[sequence], row = arguments.query_start[sequence];
  launch_dependents();
  wait_for_predecessor();
  if (splits <= 1 || head >= QUERY_HEADS) return;
  const int64 first = static_cast<int64>(sequence) * arguments.max_splits * QUERY_HEADS + head;
  const float share = share_of(lane < splits ? arguments.partial_sums[first + lane * QUERY_HEADS]
                                             : float2{minus_infinity(), 0.0f});
  const Channels* part =
      reinterpret_cast<const Channels*>(arguments.partials + first * HEAD_DIM) + lane;
  Channels sum = {};
#pragma unroll 16
  for (int split = 0; split < splits; split++) {
    const Channels value = part[split * QUERY_HEADS * 32];
    const float weight = __shfl_sync(FULL_WARP, share, split);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sum.at[i] = fmaf(weight, value.at[i], sum.at[i]);
  }
  uint32* target = reinterpret_cast<uint32*>(
      arguments.out + (static_cast<int64>(row) * QUERY_HEADS + head) * HEAD_DIM + lane * WIDTH);
#pragma unroll
  for (int i = 0; i < WIDTH; i += 2) target[i / 2] = pack_pair<BFLOAT16>(sum.at[i], sum.at[i + 1]);
}
