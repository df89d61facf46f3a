// Packed weights as an operand of wgmma. The problem is transposed: weight rows are wgmma's M = 64,
// tokens its N, so that a small batch wastes nothing.
//
// A slab holds 64 rows x 128 columns of codes: for each half of 64 columns every thread of a
// warpgroup has 16 consecutive bytes, the fragments of two multiplies (low nibbles the first, high
// the second). Per-group weights follow with one word per row pair (g, g + 8) and group:
// {scale, offset} of row g, {scale, offset} of row g + 8, where offset = 128 + s2_zero as a byte.
#pragma once
#include "ptx.cuh"

constexpr int BLOCK = 128;
constexpr int SLAB_ROWS = 64;
constexpr int HALF_BYTES = SLAB_ROWS * 64 / 2;
constexpr int CODE_BYTES = 2 * HALF_BYTES;
constexpr int GROUPS = PER_CHANNEL ? 0 : BLOCK / GROUP_SIZE;
constexpr int GROUP_BYTES = SLAB_ROWS / 2 * 4;
constexpr int SLAB_BYTES = CODE_BYTES + GROUPS * GROUP_BYTES;

// Slabs lie as [row pair of slabs][column block][slab of the pair].
DEVICE const uint8* slab_address(const uint8* weight, int slab, int block, int blocks) {
  return weight + ((static_cast<int64>(slab / 2) * blocks + block) * 2 + slab % 2) * SLAB_BYTES;
}

// One thread's share of HALVES x 64 columns of a slab, still packed.
template <int HALVES>
struct PackedFragment {
  uint4 codes[HALVES];
  uint32 scales[HALVES];

  __device__ __forceinline__ void load(uint32 slab, int first_half) {
    const int thread = threadIdx.x % 128, row_pair = thread / 32 * 8 + thread % 32 / 4;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      codes[half] = load_shared_16(slab + (first_half + half) * HALF_BYTES + thread * 16);
      const int group = GROUPS == 2 ? first_half + half : 0;
      if (GROUPS == 2 || (GROUPS == 1 && half == 0))
        scales[half] = load_shared_4(slab + CODE_BYTES + group * GROUP_BYTES + row_pair * 4);
      else
        scales[half] = scales[0];
    }
  }
};

// Four codes to four bytes code * scale + offset in one multiply-add: no product or sum leaves its
// byte. The result is the weight + 128; flipping the top bits makes it the signed weight.
DEVICE uint32 dequantize_word(uint32 codes, uint32 scale, uint32 offsets) {
  if (PER_CHANNEL) return codes;
  const uint32 bytes = codes * scale + offsets;
  return WEIGHT_OFFSET ? bytes : bytes ^ 0x80808080u;
}

// The register operands of 2 * HALVES multiplies, four words each.
template <int HALVES>
DEVICE void dequantize(const PackedFragment<HALVES>& packed, uint32 (&operand)[8 * HALVES]) {
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    const uint32 pair = packed.scales[half];
    const uint32 scale[2] = {pair & 0xFF, __byte_perm(pair, 0, 0x4442)};
    const uint32 offsets[2] = {__byte_perm(pair, 0, 0x1111), __byte_perm(pair, 0, 0x3333)};
    const uint4 codes = packed.codes[half];
    const uint32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32 low = words[i] & 0x0F0F0F0Fu, high = (words[i] >> 4) & 0x0F0F0F0Fu;
      operand[half * 8 + i] = dequantize_word(low, scale[i % 2], offsets[i % 2]);
      operand[half * 8 + 4 + i] = dequantize_word(high, scale[i % 2], offsets[i % 2]);
    }
  }
}

// Opens a batch of multiplies. The empty statement keeps the compiler from computing an operand
// after the fence, which would make it serialise them.
template <int SLABS, int WORDS>
DEVICE void open_multiplies(uint32 (&operand)[SLABS][WORDS]) {
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
    for (int i = 0; i < WORDS; i++) asm volatile("" : "+r"(operand[slab][i])::"memory");
  wgmma_fence();
}

// accumulator[slab] (+)= operand[slab] x the tokens at `tokens`, as one group in flight.
template <int SLABS, int WORDS>
DEVICE void multiply(int (&accumulator)[SLABS][TOKENS / 2], uint32 (&operand)[SLABS][WORDS],
                     uint64 tokens, bool accumulate) {
  open_multiplies(operand);
#pragma unroll
  for (int i = 0; i < WORDS; i += 4)
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
      wgmma(accumulator[slab], operand[slab][i], operand[slab][i + 1], operand[slab][i + 2],
            operand[slab][i + 3], tokens + i / 2, accumulate || i > 0);
  wgmma_commit();
}
