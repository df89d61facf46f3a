// Floats as the hardware converts them, one instruction each.
#pragma once
#include "ptx.cuh"

// The low and the high element of a pair of float16 or bfloat16.
template <bool BF16>
DEVICE float2 unpack_pair(uint32 pair) {
  if (BF16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
  float2 v;
  asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;}"
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

// a + b of pairs of float16 or bfloat16, each rounded once. float32 sums rounded to 16 bits are the same:
// where they are not exact, b is too small to change a.
template <bool BF16>
DEVICE uint32 add_pairs(uint32 a, uint32 b) {
  uint32 pair;
  if (BF16)  // a * 1 + b; sm_80 has no addition
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(0x3F803F80u), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// a & mask | bits.
DEVICE uint32 and_or(uint32 a, uint32 mask, uint32 bits) {
  uint32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
  return result;
}

// a * b + c of two pairs of float16, each rounded once.
DEVICE uint32 multiply_add(uint32 a, uint32 b, uint32 c) {
  uint32 pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

// Approximate to two units in the last place; the result for -infinity is 0.
DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Approximate to a unit in the last place; 0 where it would be below all normal floats.
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
