// W4A8 GEMM on mma.sync, for every GPU from sm_80 on. A block makes ROWS weight rows x TOKENS
// tokens; each warp multiplies 32 rows by all tokens, so no weight is dequantized twice, and
// INTERLEAVE groups of warps share out K, one block of 128 columns each per stage. Copies run ahead
// in a ring.
#include "weight.cuh"

constexpr int WARP_ROWS = 32;
constexpr int STRIPS = WARP_ROWS / 16;       // of 16 rows, the multiply's M
constexpr int ROW_WARPS = ROWS / WARP_ROWS;
constexpr int PART_THREADS = ROW_WARPS * 32;
constexpr int THREADS = PART_THREADS * INTERLEAVE;
constexpr int FINISHING_THREADS = THREADS;
#include "sums.cuh"

constexpr int STRIP_BYTES = 512;             // of one load, by a warp for 16 rows
constexpr int WARP_CODE_BYTES = 2 * LOADS * STRIPS * STRIP_BYTES;
constexpr int WARP_SCALE_BYTES = STRIPS * 8 * 4;  // of one group
constexpr int TOKEN_BYTES = TOKENS * BLOCK;
constexpr int PART_STAGE_BYTES =
    TOKEN_BYTES + ROW_WARPS * (WARP_CODE_BYTES + GROUPS * WARP_SCALE_BYTES);
constexpr int STAGE_BYTES = INTERLEAVE * PART_STAGE_BYTES;
static_assert(STAGES * STAGE_BYTES <= SHARED_BYTES && SUM_BYTES <= SHARED_BYTES,
              "too little shared memory");

// Where 16 bytes of a token lie: swizzled, so that eight tokens' equal columns share no bank.
DEVICE uint32 token_chunk(uint32 tokens, uint32 token, uint32 chunk) {
  return tokens + token * BLOCK + (chunk ^ token % 8) * 16;
}

// One warp's place in the tile.
struct Place {
  int part, warp, lane;      // of K; of the rows
  int first_row, first_token;
};

DEVICE void copy_tokens(uint32 tokens, const int8* x, const Operands& operands, const Place& place,
                        int block) {
  constexpr int step = PART_THREADS / 8;
  const int thread = place.warp * 32 + place.lane, chunk = thread % 8;
  const int column = block * BLOCK + chunk * 16;
  const int present = column < operands.columns ? operands.tokens - place.first_token : 0;
  const int64 first_token = place.first_token + thread / 8;
  const int8* source = x + first_token * operands.columns + column;
#pragma unroll 2  // more would cost the sums their registers
  for (int token = thread / 8; token < TOKENS; token += step, source += step * operands.columns)
    copy_async_16(token_chunk(tokens, token, chunk), token < present ? source : x, token < present);
}

DEVICE void copy_weights(uint32 codes, const Operands& operands, const Place& place, int block) {
  const int row = place.first_row + place.warp * WARP_ROWS, strip = row % SLAB_ROWS / 16;
  const uint8* slab = slab_address(operands.weight, row / SLAB_ROWS, block, operands.k_blocks);
#pragma unroll
  for (int load = 0; load < 2 * LOADS; load++)
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
      copy_async_16(codes + (load * STRIPS + s) * STRIP_BYTES + place.lane * 16,
                    slab + load * LOAD_BYTES + (strip + s) * STRIP_BYTES + place.lane * 16, true);
  constexpr int chunks = WARP_SCALE_BYTES / 16;
  if (place.lane < GROUPS * chunks) {
    const int group = place.lane / chunks, chunk = place.lane % chunks;
    copy_async_16(codes + WARP_CODE_BYTES + place.lane * 16,
                  slab + CODE_BYTES + group * GROUP_BYTES + strip * 8 * 4 + chunk * 16, true);
  }
}

DEVICE void multiply(int (&sum)[4], const uint32* weights, uint32 tokens0, uint32 tokens1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(tokens0),
        "r"(tokens1));
}

// One block of 128 columns.
DEVICE void accumulate(int (&accumulator)[STRIPS][TOKENS / 8][4], uint32 tokens, uint32 codes,
                       int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32 eight_tokens = token_chunk(tokens, lane % 8, half * 4 + lane / 8);
    uint32 weights[STRIPS][8];
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) {
      PackedFragment<1> packed;
      packed.load(codes + strip * STRIP_BYTES + lane * 16, STRIPS * STRIP_BYTES,
                  codes + WARP_CODE_BYTES + (strip * 8 + lane / 4) * 4, WARP_SCALE_BYTES, half);
      dequantize(packed, weights[strip]);
    }
#pragma unroll
    for (int group = 0; group < TOKENS / 8; group++) {
      uint32 columns[4];  // 64 of them, of eight tokens
      load_matrices(columns, eight_tokens + group * 8 * BLOCK);
#pragma unroll
      for (int strip = 0; strip < STRIPS; strip++) {
        multiply(accumulator[strip][group], weights[strip], columns[0], columns[1]);
        multiply(accumulator[strip][group], weights[strip] + 4, columns[2], columns[3]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    w4a8_gemm_portable(const int8* x, const Operands operands, uint16* output) {
  extern __shared__ __align__(128) uint8 dynamic[];
  const uint32 shared = shared_address(dynamic);
  const int warp = warp_index();
  const Place place = {warp / ROW_WARPS, warp % ROW_WARPS, static_cast<int>(threadIdx.x % 32),
                       static_cast<int>(blockIdx.y) * ROWS, static_cast<int>(blockIdx.x) * TOKENS};
  const int steps = (operands.k_blocks + INTERLEAVE - 1) / INTERLEAVE;
  auto tokens_of = [&](int step) {
    return shared + step % STAGES * STAGE_BYTES + place.part * PART_STAGE_BYTES;
  };
  auto codes_of = [&](int step) {
    return tokens_of(step) + TOKEN_BYTES +
           place.warp * (WARP_CODE_BYTES + GROUPS * WARP_SCALE_BYTES);
  };
  auto copy = [&](int step) {
    const int block = step * INTERLEAVE + place.part;
    if (block < operands.k_blocks) {
      copy_weights(codes_of(step), operands, place, block);
      copy_tokens(tokens_of(step), x, operands, place, block);
    }
    copy_async_commit();
  };

  launch_dependents();
  wait_for_predecessor();
  int accumulator[STRIPS][TOKENS / 8][4] = {};
  for (int step = 0; step < STAGES - 1; step++) copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    copy(step + STAGES - 1);
    if (step * INTERLEAVE + place.part < operands.k_blocks)
      accumulate(accumulator, tokens_of(step), codes_of(step), place.lane);
  }
  copy_async_wait<0>();
  __syncthreads();

  Finish finish{place.first_token, place.first_row, 0};
#pragma unroll
  for (int strip = 0; strip < STRIPS; strip++)
    store_partial_sums(reinterpret_cast<int(&)[TOKENS / 2]>(accumulator[strip]),
                       shared + place.part * PART_BYTES, place.warp * WARP_ROWS + strip * 16);
  finish.load_terms(operands);
  __syncthreads();
  finish.store(operands, shared, output);
}
