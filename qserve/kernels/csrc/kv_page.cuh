// Where a token's codes and scales lie in the block of one page and KV head (see formats/kv.py).
//
// Quantized codes lie in the order in which lanes of a warp take them as tensor-core fragments, 16
// bytes a lane and load. K: a lane's rows are tokens, and eight consecutive channels of a token (a
// chunk) are consecutive bytes. V: its rows are channels, and four consecutive channels of a token
// (a quad) are two bytes (of 4-bit codes), or two pairs of bytes.
#pragma once
#include "ptx.cuh"

constexpr int CODE_BYTES = PAGE_TOKENS * HEAD_DIM * BITS / 8;
constexpr int SCALE_BYTES = BITS == 16 ? 0 : PAGE_TOKENS * KV_SCALE_BYTES;
constexpr int BLOCK_BYTES = 2 * (CODE_BYTES + SCALE_BYTES);
constexpr int SCALE_OFFSET = 2 * CODE_BYTES;

constexpr int CHUNK = 8;
constexpr int CHUNKS = HEAD_DIM / CHUNK;
constexpr int QUAD = 4;

// A lane's 16 bytes hold UNITS times eight codes of two neighbouring tokens; a half of the block is
// [4 token pairs][LOADS][32 lanes] of them.
constexpr int UNITS = BITS == 4 ? 2 : 1;
constexpr int LOADS = HEAD_DIM / 32 / UNITS;
constexpr int CODES_BYTES = BITS;  // bytes of eight codes

DEVICE int fragment_offset(int pair, int load, int lane) {
  return ((pair * LOADS + load) * 32 + lane) * 16;
}

// Of the BITS bytes that hold one chunk of a token's K.
DEVICE int key_offset(int token, int chunk) {
  if (BITS == 16) return (token * HEAD_DIM + chunk * CHUNK) * 2;
  const int column = chunk / (CHUNKS / 4), step = chunk % (CHUNKS / 4);
  const int lane = token / 8 * 4 + column;
  const int unit = (step % UNITS) * 2 + token % 2;
  return fragment_offset(token / 2 % 4, step / UNITS, lane) + unit * CODES_BYTES;
}

// Of the two bytes that hold a quad of a token's V (of 8-bit codes: its first two channels; the
// other two lie four bytes on).
DEVICE int value_offset(int token, int quad) {
  if (BITS == 16) return CODE_BYTES + (token * HEAD_DIM + quad * QUAD) * 2;
  const int lane = quad % 8 * 4 + token / 16, step = quad / 8;
  const int unit = (step % UNITS) * 2 + token % 2;
  return CODE_BYTES + fragment_offset(token / 2 % 4, step / UNITS, lane) + unit * CODES_BYTES +
         token / 8 % 2 * 2;
}

// Of a token's (scale, offset), of K (half 0) or of V (half 1).
DEVICE int scale_offset(int half, int token) {
  return SCALE_OFFSET + half * SCALE_BYTES + token * KV_SCALE_BYTES;
}
