// The emulator's own csrc/convert.cuh.
#pragma once
#include "ptx.cuh"

template <bool BF16>
DEVICE float from_half(uint16 half) {
  if (BF16) return __uint_as_float(uint32(half) << 16);
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return value;
}

template <bool BF16>
DEVICE uint16 to_half(float value) {
  const uint32 word = emulator::to_word(value);
  if (BF16) return (word + 0x7FFF + (word >> 16 & 1)) >> 16;  // to the nearest, ties to even
  const _Float16 half = value;
  uint16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

template <bool BF16>
DEVICE float2 unpack_pair(uint32 pair) {
  return {from_half<BF16>(pair), from_half<BF16>(pair >> 16)};
}

template <bool BF16>
DEVICE uint32 pack_pair(float low, float high) {
  return to_half<BF16>(low) | uint32(to_half<BF16>(high)) << 16;
}

template <bool BF16>
DEVICE uint32 add_pairs(uint32 a, uint32 b) {
  const float2 x = unpack_pair<BF16>(a), y = unpack_pair<BF16>(b);
  return pack_pair<BF16>(x.x + y.x, x.y + y.y);
}

DEVICE uint32 and_or(uint32 a, uint32 mask, uint32 bits) { return a & mask | bits; }

// The sum of a product of two halves and a third is exact in double.
DEVICE uint32 multiply_add(uint32 a, uint32 b, uint32 c) {
  uint32 pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const _Float16 sum = double(from_half<false>(a >> shift)) * from_half<false>(b >> shift) +
                         from_half<false>(c >> shift);
    uint16 bits;
    std::memcpy(&bits, &sum, 2);
    pair |= uint32(bits) << shift;
  }
  return pair;
}

DEVICE float power_of_two(float x) { return exp2f(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }
