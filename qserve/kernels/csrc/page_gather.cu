// Pages back to 16-bit K and V, token after token, for attention over whole chunks of queries.
#include "half.cuh"
#include "kv_page.cuh"

struct Arguments {
  const uint8* pool;
  const int* page_table;  // of the first sequence
  const int* starts;      // of each sequence's tokens in keys and values, and the end
  uint16* keys;           // [tokens, heads, HEAD_DIM]
  uint16* values;
  int table_width, first_head, heads;
};

DEVICE uint32 load_4(const uint8* address) { return *reinterpret_cast<const uint32*>(address); }
DEVICE uint32 load_2(const uint8* address) { return *reinterpret_cast<const uint16*>(address); }

DEVICE void load_key_codes(const uint8* block, int token, int chunk, float (&codes)[CHUNK]) {
  const uint8* source = block + key_offset(token, chunk);
  const uint32 words[2] = {load_4(source), load_4(source + CODES_BYTES - 4)};
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    const int shift = i % 2 * 16 + (BITS == 4 ? i / 2 * 4 : i % 4 / 2 * 8);
    codes[i] = words[BITS == 4 ? 0 : i / 4] >> shift & (1 << BITS) - 1;
  }
}

DEVICE void load_value_codes(const uint8* block, int token, int chunk, float (&codes)[CHUNK]) {
#pragma unroll
  for (int quad = 0; quad < CHUNK / QUAD; quad++) {
    const uint8* source = block + value_offset(token, chunk * (CHUNK / QUAD) + quad);
    const uint32 word = load_2(source) | (BITS == 8 ? load_2(source + 4) << 16 : 0);
#pragma unroll
    for (int i = 0; i < QUAD; i++) codes[quad * QUAD + i] = word >> i * BITS & (1 << BITS) - 1;
  }
}

DEVICE void dequantize(float (&x)[CHUNK], uint32 scale_and_offset) {
  const float2 pair = unpack_pair<false>(scale_and_offset);
#pragma unroll
  for (int i = 0; i < CHUNK; i++) x[i] = fmaf(pair.x, x[i], pair.y);
}

template <bool KEY>
DEVICE uint4 read_chunk(const uint8* block, int token, int chunk) {
  float x[CHUNK];
  if (BITS == 16) {
    const int offset = KEY ? key_offset(token, chunk) : value_offset(token, chunk * (CHUNK / QUAD));
    unpack_vector<PAGE_BFLOAT16>(*reinterpret_cast<const uint4*>(block + offset), x);
  } else {
    if (KEY)
      load_key_codes(block, token, chunk, x);
    else
      load_value_codes(block, token, chunk, x);
    dequantize(x, load_4(block + scale_offset(!KEY, token)));
  }
  return pack_vector<BFLOAT16>(x);
}

extern "C" __global__ void __launch_bounds__(THREADS) page_gather(const Arguments arguments) {
  const int page = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int start = arguments.starts[sequence] + page * PAGE_TOKENS;
  const int tokens = min(PAGE_TOKENS, arguments.starts[sequence + 1] - start);
  if (tokens <= 0) return;
  const int64 id =
      arguments.page_table[static_cast<int64>(sequence) * arguments.table_width + page];
  const uint8* block = arguments.pool + (id * KV_HEADS + arguments.first_head + head) * BLOCK_BYTES;
  for (int i = threadIdx.x; i < tokens * CHUNKS; i += THREADS) {
    const int token = i / CHUNKS, chunk = i % CHUNKS;
    const int64 target =
        (static_cast<int64>(start + token) * arguments.heads + head) * CHUNKS + chunk;
    reinterpret_cast<uint4*>(arguments.keys)[target] = read_chunk<true>(block, token, chunk);
    reinterpret_cast<uint4*>(arguments.values)[target] = read_chunk<false>(block, token, chunk);
  }
}
