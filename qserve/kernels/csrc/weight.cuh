// Packed weights as an operand of the tensor cores. The problem is transposed: weight rows are the
// multiply's M, tokens its N, so that a small batch wastes little.
//
// A slab holds 64 rows x 128 columns. Of every 64 columns each thread of four warps (16 rows each)
// has, in LOADS times 16 consecutive bytes, the fragments of two multiplies 32 columns deep, for
// wgmma and mma.sync alike: of 4-bit codes the low nibbles are the first and the high the second.
// Per-group weights follow with one word per row pair (g, g + 8) and group: {scale, offset} of row
// g, {scale, offset} of row g + 8, where offset = 128 + s2_zero as a byte.
#pragma once
#include "ptx.cuh"

constexpr int BLOCK = 128;
constexpr int SLAB_ROWS = 64;
constexpr int LOADS = WEIGHT_BITS / 4;      // of 16 bytes, for 64 columns
constexpr int LOAD_BYTES = SLAB_ROWS * 2 * 16;
constexpr int CODE_BYTES = 2 * LOADS * LOAD_BYTES;
constexpr int GROUPS = GROUP_SIZE ? BLOCK / GROUP_SIZE : 0;
constexpr int GROUP_BYTES = SLAB_ROWS / 2 * 4;
constexpr int SLAB_BYTES = CODE_BYTES + GROUPS * GROUP_BYTES;

// Slabs lie as [row pair of slabs][column block][slab of the pair].
DEVICE const uint8* slab_address(const uint8* weight, int slab, int block, int blocks) {
  return weight + ((static_cast<int64>(slab / 2) * blocks + block) * 2 + slab % 2) * SLAB_BYTES;
}

// One thread's share of HALVES x 64 columns of 16 rows, still packed.
template <int HALVES>
struct PackedFragment {
  uint4 codes[HALVES * LOADS];
  uint32 scales[HALVES];

  // code_address: this thread's first 16 bytes; the next are `stride` on. scale_address: the word
  // of this thread's row pair in the first group; the next group's is `scale_stride` on.
  __device__ __forceinline__ void load(uint32 code_address, uint32 stride, uint32 scale_address,
                                       uint32 scale_stride, int first_half) {
#pragma unroll
    for (int i = 0; i < HALVES * LOADS; i++)
      codes[i] = load_shared_16(code_address + (first_half * LOADS + i) * stride);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      const int group = GROUPS == 2 ? first_half + half : 0;
      if (GROUPS == 2 || (GROUPS == 1 && half == 0))
        scales[half] = load_shared_4(scale_address + group * scale_stride);
      else
        scales[half] = scales[0];
    }
  }
};

// Four codes to four bytes code * scale + offset in one multiply-add: no product or sum leaves its
// byte. The result is the weight + 128; flipping the top bits makes it the signed weight.
DEVICE uint32 dequantize_word(uint32 codes, uint32 scale, uint32 offsets) {
  if (GROUP_SIZE == 0) return codes;
  const uint32 bytes = codes * scale + offsets;
  return WEIGHT_OFFSET ? bytes : bytes ^ 0x80808080u;
}

// The register operands of 2 * HALVES multiplies, four words each.
template <int HALVES>
DEVICE void dequantize(const PackedFragment<HALVES>& packed, uint32 (&operand)[8 * HALVES]) {
#pragma unroll
  for (int load = 0; load < HALVES * LOADS; load++) {
    const uint4 codes = packed.codes[load];
    const uint32 words[4] = {codes.x, codes.y, codes.z, codes.w};
    const uint32 pair = packed.scales[load / LOADS];
    const uint32 scale[2] = {pair & 0xFF, __byte_perm(pair, 0, 0x4442)};
    const uint32 offsets[2] = {__byte_perm(pair, 0, 0x1111), __byte_perm(pair, 0, 0x3333)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (WEIGHT_BITS == 8) {
        // Signed to unsigned: also keeps a load from writing a register that a multiply reads.
        operand[load * 4 + i] = words[i] ^ 0x80808080u;
      } else {
        const uint32 low = words[i] & 0x0F0F0F0Fu, high = (words[i] >> 4) & 0x0F0F0F0Fu;
        operand[load * 8 + i] = dequantize_word(low, scale[i % 2], offsets[i % 2]);
        operand[load * 8 + 4 + i] = dequantize_word(high, scale[i % 2], offsets[i % 2]);
      }
    }
  }
}
