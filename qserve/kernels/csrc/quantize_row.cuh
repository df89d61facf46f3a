// THREADS threads, the first of a block, hold one token's row in registers, reduce over it and make it
// int8.
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

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
  __device__ __forceinline__ int over_warp(int value) const {
    return __reduce_add_sync(FULL_WARP, value);
  }
  // Over eight neighbours first, then over their sums: csrc/tail_large.cuh adds in this order, too.
  __device__ __forceinline__ float over_warp(float value) const {
#pragma unroll
    for (int i = 0; i < 5; i++)
      value += __shfl_xor_sync(FULL_WARP, value, i < 3 ? 4 >> i : 1 << i);
    return value;
  }
};

// Of floats that are not negative, which their bits are in the order of.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ float over_warp(float value) const {
    return __uint_as_float(__reduce_max_sync(FULL_WARP, __float_as_uint(value)));
  }
};

// Every thread gets the reduction over all values, in the order [COUNT][THREADS]; `scratch` serves one
// reduction of a row only.
template <class T, class Combine, int COUNT>
DEVICE T reduce(T (&values)[COUNT], Combine combine, T (&scratch)[COUNT * WARPS]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) values[i] = combine.over_warp(values[i]);
  if (COUNT * WARPS == 1) return values[0];
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (threadIdx.x % 32 == 0) scratch[i * WARPS + threadIdx.x / 32] = values[i];
  named_barrier(0, THREADS);
  T total = scratch[0];
#pragma unroll
  for (int i = 1; i < COUNT * WARPS; i++) total = combine(total, scratch[i]);
  return total;
}

template <class T, class Combine>
DEVICE T reduce(T value, Combine combine, T (&scratch)[WARPS]) {
  T values[1] = {value};
  return reduce(values, combine, scratch);
}

struct Quantized {
  int8* codes;
  float* scale;
  int* row_sum;
};

__shared__ float maxima[WARPS];
__shared__ int sums[WARPS];

// Four values times `factor` as bytes, to the nearest, ties to even: after 1.5 * 2^23 is added, a
// float's lowest bits are the integer.
DEVICE uint32 round_to_bytes(const float* values, float factor) {
  uint32 integers[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    integers[i] = __float_as_uint(__fadd_rn(__fmul_rn(values[i], factor), 12582912.0f));
  return __byte_perm(__byte_perm(integers[0], integers[1], 0x0040),
                     __byte_perm(integers[2], integers[3], 0x0040), 0x5410);
}

// The rule of formats/activation.py, bit for bit, for a row whose largest magnitude is known. No product
// is beyond the limit, so none is clamped.
DEVICE float code_scale(float largest) { return __fdiv_rn(largest, ACTIVATION_MAX); }
DEVICE float inverse_scale(float largest) {
  const float limit = ACTIVATION_MAX, largest_float = __uint_as_float(0x7F7FFFFFu);
  return fminf(__fdiv_rn(limit, largest), largest_float);
}

// A vector's codes, stored and added to `sum`.
DEVICE void quantize_vector(const float (&values)[WIDTH], float inverse, int8* codes, int& sum) {
  constexpr int ones = 0x01010101;
  const uint2 v = make_uint2(round_to_bytes(values, inverse), round_to_bytes(values + 4, inverse));
  sum = __dp4a(static_cast<int>(v.y), ones, __dp4a(static_cast<int>(v.x), ones, sum));
  *reinterpret_cast<uint2*>(codes) = v;
}

DEVICE void quantize_row(Values& values, const Quantized& out, int64 row) {
  float largest = 0;
  values.each([&](int, float(&v)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) largest = fmaxf(largest, fabsf(v[i]));
  });
  largest = reduce(largest, Max(), maxima);

  const float inverse = inverse_scale(largest);
  int sum = 0;
  values.each([&](int vector, float(&v)[WIDTH]) {
    quantize_vector(v, inverse, out.codes + row * COLUMNS + vector * WIDTH, sum);
  });
  sum = reduce(sum, Sum(), sums);
  if (threadIdx.x == 0) {
    out.scale[row] = code_scale(largest);
    out.row_sum[row] = sum;
  }
}
