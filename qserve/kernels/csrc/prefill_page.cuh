// A page's K and V as float16 tiles in shared memory, the way warpgroup multiplies take them: rows
// of 128 bytes, swizzled.
//
// Tokens and channels are permuted in the tiles, alike in both operands of a product, so that a
// thread's codes become 16-byte stores, and a thread's fragments of q and of the output are
// neighbouring channels. Four warps share a page; each thread has 16 bytes of codes at a time.
#pragma once
#include "convert.cuh"
#include "kv_page.cuh"

constexpr int COLUMN_BYTES = PAGE_TOKENS * 128;  // of 64 channels of a page's K
constexpr int TILE_BYTES = PAGE_TOKENS * HEAD_DIM * 2;

// Eight codes of a token, or four each of two tokens eight apart.
struct Codes {
  uint32 words[2];  // of 4-bit codes the first alone

  // Codes 2 index and 2 index + 1, as scale * code + offset, rounded once.
  __device__ __forceinline__ uint32 dequantize(int index, uint32 scale, uint32 offset) const {
    constexpr uint32 exponent = 0x64006400u;  // of 1024: integers below are its last bits
    constexpr uint32 one = 0x3C003C00u, sixteenth = 0x2C002C00u;
    constexpr uint32 minus_1024 = 0xE400E400u, minus_64 = 0xD400D400u;
    const bool high = BITS == 4 && index % 2;  // the code lies four bits up
    const uint32 mask = BITS == 8 ? 0x00FF00FFu : high ? 0x00F000F0u : 0x000F000Fu;
    const uint32 word = BITS == 8 ? words[index / 2] >> index % 2 * 8 : words[0] >> index / 2 * 8;
    const uint32 code = multiply_add(and_or(word, mask, exponent), high ? sixteenth : one,
                                     high ? minus_64 : minus_1024);
    return multiply_add(code, scale, offset);
  }
};

// Where a chunk of eight elements lies in rows of 128 bytes, swizzled as the multiply expects.
DEVICE uint32 swizzled(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

// The row of K's tile, and the column of V's, that holds token 16 g1 + 8 g0 + 4 a + 2 b + i.
DEVICE int tile_row(int g1, int g0, int a, int b, int i) {
  return 32 * a + 8 * g1 + 4 * b + 2 * i + g0;
}

// A producer thread's share of a page's K: two tokens, HEAD_DIM / 4 channels of each.
//
// Channels 4 c + 2 h + e of sixteen (c: 0..3, h and e: 0, 1) lie at place 8 h + 2 c + e, so that a
// thread's fragments of q, at 2 c + e and 8 + 2 c + e, are four neighbouring channels.
struct KeyCodes {
  static constexpr int PAIRS = HEAD_DIM / 64;  // of chunks
  uint4 fragments[PAIRS][BITS / 4];
  uint2 scales;
  int tokens;  // visible

  __device__ __forceinline__ void load(const uint8* block, int visible) {
    const int lane = threadIdx.x % 32, pair = threadIdx.x / 32 % 4;
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
      for (int part = 0; part < BITS / 4; part++)
        fragments[i][part] = __ldg(reinterpret_cast<const uint4*>(
            block + fragment_offset(pair, chunk_pair(i) * (BITS / 4) + part, lane)));
    const int token = lane / 4 * 8 + pair * 2;
    scales = __ldg(reinterpret_cast<const uint2*>(block + scale_offset(0, token)));
    tokens = visible;
  }

  __device__ __forceinline__ void store(uint32 tile) {
    const int lane = threadIdx.x % 32, pair = threadIdx.x / 32 % 4, group = lane / 4;
    if (tokens < PAGE_TOKENS) {
      const int token = group * 8 + pair * 2;
      if (token >= tokens) scales.x = 0;
      if (token + 1 >= tokens) scales.y = 0;
    }
#pragma unroll
    for (int token = 0; token < 2; token++) {
      const int row = tile_row(group / 2, group % 2, pair / 2, pair % 2, token);
      const uint32 both = token ? scales.y : scales.x;
      const uint32 scale = __byte_perm(both, both, 0x1010);
      const uint32 offset = __byte_perm(both, both, 0x3232);
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const Codes low = codes(i, token, 0), high = codes(i, token, 1);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int chunk = (lane % 4 * PAIRS + chunk_pair(i)) * 2 + h;
          store_shared_16(
              tile + chunk / 8 * COLUMN_BYTES + swizzled(row, chunk % 8),
              low.dequantize(h, scale, offset), low.dequantize(2 + h, scale, offset),
              high.dequantize(h, scale, offset), high.dequantize(2 + h, scale, offset));
        }
      }
    }
  }

 private:
  // In an order that spares lanes from meeting in a bank.
  static __device__ __forceinline__ int chunk_pair(int i) {
    return PAIRS == 1 ? i : i ^ threadIdx.x % 4 / 2;
  }

  __device__ __forceinline__ Codes codes(int i, int token, int chunk) const {
    if constexpr (BITS == 4) {
      const uint4& v = fragments[i][0];
      return chunk ? Codes{token ? v.w : v.z} : Codes{token ? v.y : v.x};
    } else {
      const uint4& v = fragments[i][chunk];
      return token ? Codes{v.z, v.w} : Codes{v.x, v.y};
    }
  }
};

// A producer thread's share of a page's V: eight tokens, HEAD_DIM / 16 channels of each, which are
// the rows of the tile.
//
// Channel 8 c + 2 j + e of 32 (c, j: 0..3, e: 0, 1) lies at place 8 j + 2 c + e, so that a thread's
// outputs, at 2 c + e of every eight, are eight neighbouring channels.
struct ValueCodes {
  static constexpr int QUADS = HEAD_DIM / 64;
  uint2 parts[QUADS][2][BITS / 4];
  uint4 scales[2];  // of four neighbouring tokens, and of those eight further on
  int tokens;       // visible

  __device__ __forceinline__ void load(const uint8* block, int visible) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < QUADS; i++)
#pragma unroll
      for (int b = 0; b < 2; b++)
#pragma unroll
        for (int part = 0; part < BITS / 4; part++)
          parts[i][b][part] = __ldg(reinterpret_cast<const uint2*>(
              block + CODE_BYTES + fragment_offset(2 * a() + b, quad(i) / UNITS, lane) +
              (quad(i) % UNITS + part) * 8));
#pragma unroll
    for (int g0 = 0; g0 < 2; g0++) {
      const int token = lane % 4 * 16 + g0 * 8 + a() * 4;
      scales[g0] = __ldg(reinterpret_cast<const uint4*>(block + scale_offset(1, token)));
    }
    tokens = visible;
  }

  __device__ __forceinline__ void store(uint32 tile) {
    const int lane = threadIdx.x % 32, p = lane / 4, column = tile_row(lane % 4, 0, a(), 0, 0);
    if (tokens < PAGE_TOKENS) hide();
    const uint32 low[4] = {scales[0].x, scales[0].y, scales[0].z, scales[0].w};
    const uint32 high[4] = {scales[1].x, scales[1].y, scales[1].z, scales[1].w};
#pragma unroll
    for (int i = 0; i < QUADS; i++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int row = quad(i) * 32 + (p % 2 * 2 + k / 2) * 8 + p / 2 * 2 + k % 2;
        uint32 pairs[4];
#pragma unroll
        for (int t = 0; t < 4; t++)
          pairs[t] = codes(i, t / 2, t % 2).dequantize(k, __byte_perm(low[t], high[t], 0x5410),
                                                       __byte_perm(low[t], high[t], 0x7632));
        store_shared_16(tile + swizzled(row, column / 8), pairs[0], pairs[1], pairs[2], pairs[3]);
      }
  }

 private:
  // Whatever lies in memory there, even NaN, becomes zero.
  __device__ __forceinline__ void hide() {
#pragma unroll
    for (int g0 = 0; g0 < 2; g0++) {
      const int token = threadIdx.x % 4 * 16 + g0 * 8 + a() * 4;
      if (token >= tokens) scales[g0].x = 0;
      if (token + 1 >= tokens) scales[g0].y = 0;
      if (token + 2 >= tokens) scales[g0].z = 0;
      if (token + 3 >= tokens) scales[g0].w = 0;
    }
  }

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }

  // Neighbouring lanes take different columns, which spares them from meeting in a bank.
  static __device__ __forceinline__ int a() { return (warp() ^ threadIdx.x / 4) % 2; }

  // The quad is `quad(i) * 8 + lane / 4`.
  static __device__ __forceinline__ int quad(int i) { return warp() / 2 * QUADS + i; }

  __device__ __forceinline__ Codes codes(int i, int b, int token) const {
    const uint2(&v)[BITS / 4] = parts[i][b];
    if constexpr (BITS == 4)
      return {token ? v[0].y : v[0].x};
    else
      return {v[token].x, v[token].y};
  }
};
