// Floats as the hardware takes them: pairs of 16 bits in one register, powers of two.
#pragma once
#include "ptx.cuh"

DEVICE float minus_infinity() { return __uint_as_float(0xFF800000u); }

// The low and the high element of a pair of float16 or bfloat16.
template <bool BF16>
DEVICE float2 unpack_pair(uint32 pair) {
  if (BF16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
  float2 v;
  asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, "
      "high;}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(pair));
  return v;
}

// Rounded to the nearest even.
template <bool BF16>
DEVICE uint32 pack_pair(float low, float high) {
  uint32 pair;
  if (BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Eight elements of 16 bits, as one 16-byte vector.
template <bool BF16>
DEVICE void unpack_vector(uint4 vector, float (&values)[8]) {
  const uint32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = unpack_pair<BF16>(words[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

template <bool BF16>
DEVICE uint4 pack_vector(const float (&values)[8]) {
  return make_uint4(pack_pair<BF16>(values[0], values[1]), pack_pair<BF16>(values[2], values[3]),
                    pack_pair<BF16>(values[4], values[5]), pack_pair<BF16>(values[6], values[7]));
}

DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
