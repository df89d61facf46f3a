// A team, the first THREADS threads of a block, holds one token's row in registers, reduces over it
// and makes it int8.
#pragma once
#include "half.cuh"

constexpr int WIDTH = 8;  // elements of a 16-byte vector
constexpr int VECTORS = COLUMNS / WIDTH;
constexpr int PER_THREAD = (VECTORS + THREADS - 1) / THREADS;
constexpr int WARPS = THREADS / 32;
static_assert(COLUMNS % WIDTH == 0, "rows are read in vectors of 16 bytes");

// `body(i, vector)` for this thread's part of a row: vectors thread, thread + THREADS, ... as far as
// there are any.
template <class Body>
DEVICE void each_vector(Body body) {
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    const int vector = i * THREADS + threadIdx.x;
    if (VECTORS % THREADS == 0 || vector < VECTORS) body(i, vector);
  }
}

struct Values {
  float at[PER_THREAD][WIDTH];

  // `body(vector, values)` for every vector of this thread.
  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    each_vector([&](int i, int vector) { body(vector, at[i]); });
  }
};

DEVICE void load_vector(float (&values)[WIDTH], const uint16* row, int vector) {
  unpack_vector<BFLOAT16>(reinterpret_cast<const uint4*>(row)[vector], values);
}

DEVICE void store_vector(uint16* row, int vector, const float (&values)[WIDTH]) {
  reinterpret_cast<uint4*>(row)[vector] = pack_vector<BFLOAT16>(values);
}

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Every thread gets the reduction over the team. `scratch` serves one reduction of a row only.
template <class T, class Combine>
DEVICE T reduce(T value, Combine combine, T (&scratch)[WARPS]) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    value = combine(value, __shfl_xor_sync(FULL_WARP, value, lane));
  if (WARPS == 1) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  named_barrier(0, THREADS);
  T total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; warp++) total = combine(total, scratch[warp]);
  return total;
}

struct Quantized {
  int8* codes;
  float* scale;
  int* row_sum;
};

__shared__ float maxima[WARPS];
__shared__ int sums[WARPS];

// The rule of formats/activation.py, bit for bit.
DEVICE void quantize_row(Values& values, const Quantized& out, int64 row) {
  float largest = 0;
  values.each([&](int, float(&v)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) largest = fmaxf(largest, fabsf(v[i]));
  });
  largest = reduce(largest, Max(), maxima);

  const float limit = ACTIVATION_MAX;
  const float inverse = largest > 0 ? __fdiv_rn(limit, largest) : 0.0f;
  int sum = 0;
  values.each([&](int vector, float(&v)[WIDTH]) {
    uint32 bytes[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      const float scaled = __fmul_rn(v[i], inverse);
      const int code = __float2int_rn(fminf(fmaxf(scaled, -limit), limit));
      sum += code;
      bytes[i / 4] |= (code & 0xFF) << i % 4 * 8;
    }
    reinterpret_cast<uint2*>(out.codes + row * COLUMNS)[vector] = make_uint2(bytes[0], bytes[1]);
  });
  sum = reduce(sum, Add(), sums);
  if (threadIdx.x == 0) {
    out.scale[row] = __fdiv_rn(largest, limit);
    out.row_sum[row] = sum;
  }
}
