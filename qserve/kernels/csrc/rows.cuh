// What the producers do to one token's row.
#pragma once
#include "quantize_row.cuh"

// Vectors of a row as they lie in memory, fetched before they are needed.
template <class T>
struct Fetched {
  static constexpr int WORDS = sizeof(T) / 2;  // of 16 bytes, for WIDTH elements
  uint4 at[PER_THREAD][WORDS];

  __device__ __forceinline__ void fetch(const T* row) {
    each_vector([&](int i, int vector) {
#pragma unroll
      for (int word = 0; word < WORDS; word++)
        at[i][word] = reinterpret_cast<const uint4*>(row)[vector * WORDS + word];
    });
  }
};

DEVICE void unpack(const uint4 (&words)[1], float (&values)[WIDTH]) {
  unpack_vector<BFLOAT16>(words[0], values);
}

DEVICE void unpack(const uint4 (&words)[2], float (&values)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    const uint4 w = words[i / 4];
    const uint32 bits[4] = {w.x, w.y, w.z, w.w};
    values[i] = __uint_as_float(bits[i % 4]);
  }
}

// RMSNorm of x + residual, the sum rounded to their type and kept in `total`; without a residual,
// of x alone.
struct Norm {
  const uint16* residual;  // may be null
  const NormWeight* weight;
  uint16* total;
  float eps;
};

DEVICE uint4 add_vectors(const uint4& a, const uint4& b) {
  return make_uint4(add_pairs<BFLOAT16>(a.x, b.x), add_pairs<BFLOAT16>(a.y, b.y),
                    add_pairs<BFLOAT16>(a.z, b.z), add_pairs<BFLOAT16>(a.w, b.w));
}

DEVICE float sum_of_squares(const float (&values)[WIDTH]) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < WIDTH; e++) sum = fmaf(values[e], values[e], sum);
  return sum;
}

DEVICE float inverse_rms(float squares, float eps) { return __frsqrt_rn(squares / COLUMNS + eps); }

// The weight comes first, so that the largest is known before the row's factor is.
DEVICE float weighted(float value, float weight) { return __fmul_rn(value, weight); }

__shared__ float squares[PER_THREAD * WARPS];

// One row of a norm. Everything but x may be fetched before x is there; no load comes after a store,
// past which the compiler may not move it.
struct NormRow {
  const Norm& norm;
  Fetched<NormWeight> gain;
  Fetched<uint16> residual = {}, x;

  __device__ __forceinline__ explicit NormRow(const Norm& n) : norm(n) { gain.fetch(n.weight); }

  __device__ __forceinline__ void fetch_residual(int64 row) {
    if (norm.residual != nullptr) residual.fetch(norm.residual + row * COLUMNS);
  }
  __device__ __forceinline__ void fetch_x(const uint16* rows, int64 row) {
    x.fetch(rows + row * COLUMNS);
  }

  // sums: the squares' of each vector. Without a residual zeros are added, which takes no branch: around
  // one the compiler would keep all vectors unpacked.
  __device__ __forceinline__ void add_residual(Values& values, float (&sums)[PER_THREAD], int64 row) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) sums[i] = 0;
    each_vector([&](int i, int vector) {
      const uint4 total = add_vectors(x.at[i][0], residual.at[i][0]);
      unpack_vector<BFLOAT16>(total, values.at[i]);
      if (norm.residual != nullptr)
        reinterpret_cast<uint4*>(norm.total + row * COLUMNS)[vector] = total;
      sums[i] = sum_of_squares(values.at[i]);
    });
  }

  __device__ __forceinline__ void normalize(Values& values, int64 row) {
    float sums[PER_THREAD];
    add_residual(values, sums, row);
    const float factor = inverse_rms(reduce(sums, Sum(), squares), norm.eps);
    each_vector([&](int i, int) {
      float weights[WIDTH];
      unpack(gain.at[i], weights);
#pragma unroll
      for (int e = 0; e < WIDTH; e++)
        values.at[i][e] = __fmul_rn(weighted(values.at[i][e], weights[e]), factor);
    });
  }
};

// Good to a few units in the last place; a quotient below all normal floats is 0.
DEVICE float silu(float x) {
  constexpr float log2_e = 1.44269504f;
  return x * reciprocal(1.0f + power_of_two(x * -log2_e));
}

// silu(gate) * up, of a row that holds the gates, then the ups. All of it is asked for before any is
// needed.
DEVICE void silu_mul_row(Values& values, const uint16* gate_up) {
  Fetched<uint16> gate, up;
  gate.fetch(gate_up);
  up.fetch(gate_up + COLUMNS);
  each_vector([&](int i, int) {
    float(&v)[WIDTH] = values.at[i];
    float factors[WIDTH];
    unpack(gate.at[i], v);
    unpack(up.at[i], factors);
#pragma unroll
    for (int e = 0; e < WIDTH; e++) v[e] = silu(v[e]) * factors[e];
  });
}
