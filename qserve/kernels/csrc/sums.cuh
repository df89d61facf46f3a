// The end of a tile whose K was cut: every part leaves its exact integer sums in shared memory,
// then the threads add them, finish the outputs and store four neighbouring rows of a token.
#pragma once
#include "epilogue.cuh"

// int32 [INTERLEAVE][TOKENS][PITCH]; padded against bank conflicts.
constexpr int PITCH = ROWS + 4;
constexpr int PART_BYTES = TOKENS * PITCH * 4;
constexpr int SUM_BYTES = INTERLEAVE * PART_BYTES;

// Every block of a cluster finishes its share of the tokens.
constexpr int SHARE_TOKENS = TOKENS / CLUSTER;
constexpr int QUADS = ROWS / 4;
constexpr int PASSES = (SHARE_TOKENS * QUADS + FINISHING_THREADS - 1) / FINISHING_THREADS;
constexpr int BATCH = PASSES < 4 ? PASSES : 4;  // passes in flight together
static_assert(FINISHING_THREADS % QUADS == 0, "a thread keeps its rows in every pass");

// accumulator: 16 rows x 2 * COUNT tokens of a warp as the tensor cores lay them out.
template <int COUNT>
DEVICE void store_partial_sums(const int (&accumulator)[COUNT], uint32 part, int first_row) {
  const int lane = threadIdx.x % 32, row = first_row + lane / 4;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    store_shared_4(part + (token * PITCH + row + i % 4 / 2 * 8) * 4, accumulator[i]);
  }
}

DEVICE int4 add_parts(uint32 address) {
  int4 sum = make_int4(0, 0, 0, 0);
#pragma unroll
  for (int part = 0; part < INTERLEAVE; part++)
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) {
      const uint32 own = address + part * PART_BYTES;
      int4 v;
      if constexpr (CLUSTER > 1) {
        v = load_peer_16(peer_address(own, rank));
      } else {
        const uint4 raw = load_shared_16(own);
        v = make_int4(raw.x, raw.y, raw.z, raw.w);
      }
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  return sum;
}

// One thread's outputs: four rows of the tokens of its passes.
struct Finish {
  int first_token, first_row, share_start;  // of the tile; of this block's share, within the tile
  Row rows[4];
  Token tokens[BATCH];

  __device__ __forceinline__ int row() const { return first_row + threadIdx.x % QUADS * 4; }
  __device__ __forceinline__ int token(int pass) const {
    return share_start + (pass * FINISHING_THREADS + threadIdx.x) / QUADS;
  }
  __device__ __forceinline__ void load_tokens(const Operands& operands, int first_pass) {
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      tokens[i] = load_token(operands, first_token + token(first_pass + i));
  }
  __device__ __forceinline__ void load_terms(const Operands& operands) {
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = load_row(operands, row() + i);
    load_tokens(operands, 0);
  }
  __device__ __forceinline__ void store_quad(const Operands& operands, uint32 sums, uint16* output,
                                             int index, const Token& terms) const {
    if (index >= share_start + SHARE_TOKENS || first_token + index >= operands.tokens) return;
    const int4 sum = add_parts(sums + (index * PITCH + row() - first_row) * 4);
    const float first = finish(sum.x, rows[0], terms), second = finish(sum.y, rows[1], terms);
    const float third = finish(sum.z, rows[2], terms), fourth = finish(sum.w, rows[3], terms);
    const int64 start = static_cast<int64>(first_token + index) * operands.rows + row();
    store_relaxed_8(output + start, pack_pair<BFLOAT16>(first, second),
                    pack_pair<BFLOAT16>(third, fourth));
  }
  // After `load_terms`, once every part's sums can be seen.
  __device__ __forceinline__ void store(const Operands& operands, uint32 sums, uint16* output) {
    if (row() >= operands.rows) return;
#pragma unroll 1
    for (int first_pass = 0; first_pass < PASSES; first_pass += BATCH) {
      if (first_pass > 0) load_tokens(operands, first_pass);
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        store_quad(operands, sums, output, token(first_pass + i), tokens[i]);
    }
  }
};
