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

__shared__ float squares[TEAMS][PARTS * WARPS];

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

  // sums: the squares' of this thread, in the order in which SUM_THREADS threads would add them. Without
  // a residual zeros are added, which takes no branch: around one the compiler would keep all vectors
  // unpacked.
  __device__ __forceinline__ void add_residual(Values& values, float (&sums)[PARTS], int64 row) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) sums[part] = 0;
    each_vector([&](int i, int vector) {
      float(&v)[WIDTH] = values.at[i];
      float added[WIDTH];
      unpack(x.at[i], v);
      unpack(residual.at[i], added);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) v[e] += added[e];
      const uint4 total = pack_vector<BFLOAT16>(v);
      if (norm.residual != nullptr)
        reinterpret_cast<uint4*>(norm.total + row * COLUMNS)[vector] = total;
      unpack_vector<BFLOAT16>(total, v);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) sums[i % PARTS] += v[e] * v[e];
    });
  }

  __device__ __forceinline__ void normalize(Values& values, int64 row) {
    normalize(values, row, [] {});
  }
  // `release` is called when what has been fetched is no longer needed.
  template <class Release>
  __device__ __forceinline__ void normalize(Values& values, int64 row, Release release) {
    float sums[PARTS];
    add_residual(values, sums, row);
    release();
    const float sum = reduce(sums, Sum(), squares);
    const float inverse_rms = __frsqrt_rn(sum / COLUMNS + norm.eps);
    each_vector([&](int i, int) {
      float weights[WIDTH];
      unpack(gain.at[i], weights);
#pragma unroll
      for (int e = 0; e < WIDTH; e++)
        values.at[i][e] = __fmul_rn(__fmul_rn(values.at[i][e], inverse_rms), weights[e]);
    });
  }
};

// Good to a few units in the last place; a quotient below all normal floats is 0.
DEVICE float silu(float x) {
  constexpr float log2_e = 1.44269504f;
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power_of_two(x * -log2_e)));
  return x * inverse;
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
