// The ops that make a linear's int8 input. One block holds one token's row in registers, so every
// value is read once and written once.
#include "half.cuh"

constexpr int WIDTH = 8;  // elements of a 16-byte vector
constexpr int VECTORS = COLUMNS / WIDTH;
constexpr int PER_THREAD = (VECTORS + THREADS - 1) / THREADS;
constexpr int WARPS = THREADS / 32;
static_assert(COLUMNS % WIDTH == 0, "rows are read in vectors of 16 bytes");

// One thread's part of a row: vectors thread, thread + THREADS, ... as far as there are any.
struct Values {
  float at[PER_THREAD][WIDTH];

  // `body(vector, values)` for every vector of this thread.
  template <class Body>
  __device__ __forceinline__ void each(Body body) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const int vector = i * THREADS + threadIdx.x;
      if (VECTORS % THREADS == 0 || vector < VECTORS) body(vector, at[i]);
    }
  }
};

DEVICE void load_vector(float (&values)[WIDTH], const uint16* row, int vector) {
  unpack_vector<BFLOAT16>(reinterpret_cast<const uint4*>(row)[vector], values);
}

DEVICE void load_vector(float (&values)[WIDTH], const float* row, int vector) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) values[i] = row[vector * WIDTH + i];
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

// Every thread gets the reduction over the block. `scratch` serves one reduction only.
template <class T, class Combine>
DEVICE T reduce(T value, Combine combine, T (&scratch)[WARPS]) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    value = combine(value, __shfl_xor_sync(FULL_WARP, value, lane));
  if (WARPS == 1) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
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

// The rule of formats/activation.py, bit for bit.
DEVICE void quantize_row(Values& values, const Quantized& out) {
  __shared__ float maxima[WARPS];
  __shared__ int sums[WARPS];
  const int64 row = blockIdx.x;
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

// x + residual, rounded to their type (and kept in `total`, where there is a residual), normalized.
DEVICE void normalize_row(Values& values, const uint16* x, const uint16* residual,
                          const NormWeight* weight, float eps, uint16* total) {
  __shared__ float squares[WARPS];
  const int64 start = static_cast<int64>(blockIdx.x) * COLUMNS;
  float sum = 0;
  values.each([&](int vector, float(&v)[WIDTH]) {
    load_vector(v, x + start, vector);
    if (residual != nullptr) {
      float added[WIDTH];
      load_vector(added, residual + start, vector);
#pragma unroll
      for (int i = 0; i < WIDTH; i += 2) {
        const uint32 sums = pack_pair<BFLOAT16>(v[i] + added[i], v[i + 1] + added[i + 1]);
        const float2 rounded = unpack_pair<BFLOAT16>(sums);
        v[i] = rounded.x, v[i + 1] = rounded.y;
      }
      store_vector(total + start, vector, v);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sum += v[i] * v[i];
  });
  sum = reduce(sum, Add(), squares);

  const float inverse_rms = __frsqrt_rn(sum / COLUMNS + eps);
  values.each([&](int vector, float(&v)[WIDTH]) {
    float gain[WIDTH];
    load_vector(gain, weight, vector);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v[i] = __fmul_rn(__fmul_rn(v[i], inverse_rms), gain[i]);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const uint16* x, const uint16* residual, const NormWeight* weight, float eps,
             uint16* total, uint16* normed) {
  launch_dependents();
  wait_for_predecessor();
  Values values;
  normalize_row(values, x, residual, weight, eps, total);
  values.each([&](int vector, float(&v)[WIDTH]) {
    store_vector(normed + static_cast<int64>(blockIdx.x) * COLUMNS, vector, v);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_quantize(const uint16* x, const uint16* residual, const NormWeight* weight, float eps,
                      uint16* total, Quantized out) {
  launch_dependents();
  wait_for_predecessor();
  Values values;
  normalize_row(values, x, residual, weight, eps, total);
  quantize_row(values, out);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    silu_mul_quantize(const uint16* gate_up, Quantized out) {
  launch_dependents();
  wait_for_predecessor();
  const uint16* row = gate_up + static_cast<int64>(blockIdx.x) * 2 * COLUMNS;
  Values values;
  values.each([&](int vector, float(&v)[WIDTH]) {
    float up[WIDTH];
    load_vector(v, row, vector);
    load_vector(up, row + COLUMNS, vector);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v[i] = __fdividef(v[i], 1.0f + __expf(-v[i])) * up[i];
  });
  quantize_row(values, out);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_per_token(const uint16* x, Quantized out) {
  launch_dependents();
  wait_for_predecessor();
  Values values;
  values.each([&](int vector, float(&v)[WIDTH]) {
    load_vector(v, x + static_cast<int64>(blockIdx.x) * COLUMNS, vector);
  });
  quantize_row(values, out);
}
