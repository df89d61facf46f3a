// Pages back to 16-bit K and V, token after token, for attention over whole chunks of queries. A
// thread takes 16 bytes of codes at a time, as they lie: several tokens' neighbouring channels.
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

// One page of one head: where it comes from and where it goes.
struct Page {
  const uint8* block;
  uint16* keys;  // of its first token
  uint16* values;
  int tokens;
  int64 token_stride;

  __device__ __forceinline__ float2 scale_and_offset(int half, int token) const {
    const uint8* address = block + scale_offset(half, token);
    return unpack_pair<false>(*reinterpret_cast<const uint32*>(address));
  }
};

// The conversion proper is a slow instruction.
DEVICE float to_float(uint32 code) { return __uint_as_float(0x4B000000u | code) - 8388608.0f; }

DEVICE float dequantize(uint32 code, float2 scale) {
  return fmaf(scale.x, to_float(code & (1 << BITS) - 1), scale.y);
}

struct Fragment {
  int pair, load, group, column;
  uint32 words[4];

  __device__ __forceinline__ Fragment(const uint8* codes, int index) {
    const int lane = index % 32;
    load = index / 32 % LOADS, pair = index / 32 / LOADS, group = lane / 4, column = lane % 4;
    const uint4 v = reinterpret_cast<const uint4*>(codes)[index];
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }

  // Of eight codes' words, where there are two to a unit.
  __device__ __forceinline__ uint32 word(int unit, int half) const {
    return words[BITS == 4 ? unit : unit * 2 + half];
  }
};

// Eight channels of each of two tokens, once or twice.
DEVICE void store_keys(const Page& page, const Fragment& codes) {
#pragma unroll
  for (int unit = 0; unit < 2 * UNITS; unit++) {
    const int token = codes.group * 8 + codes.pair * 2 + unit % 2;
    const int chunk = codes.column * (CHUNKS / 4) + codes.load * UNITS + unit / 2;
    if (token >= page.tokens) continue;
    const float2 scale = page.scale_and_offset(0, token);
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      const int shift = i % 2 * 16 + (BITS == 4 ? i / 2 * 4 : i % 4 / 2 * 8);
      x[i] = dequantize(codes.word(unit, i / 4) >> shift, scale);
    }
    uint4* row = reinterpret_cast<uint4*>(page.keys + token * page.token_stride);
    row[chunk] = pack_vector<BFLOAT16>(x);
  }
}

// Four channels of each of four tokens, once or twice.
DEVICE void store_values(const Page& page, const Fragment& codes) {
#pragma unroll
  for (int part = 0; part < 4 * UNITS; part++) {
    const int unit = part / 2, eight = part % 2;
    const int token = codes.column * 16 + eight * 8 + codes.pair * 2 + unit % 2;
    const int quad = (codes.load * UNITS + unit / 2) * 8 + codes.group;
    if (token >= page.tokens) continue;
    const float2 scale = page.scale_and_offset(1, token);
    float x[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
      const int shift = eight * 16 + (BITS == 4 ? i * 4 : i % 2 * 8);
      x[i] = dequantize(codes.word(unit, i / 2) >> shift, scale);
    }
    uint2* row = reinterpret_cast<uint2*>(page.values + token * page.token_stride);
    row[quad] = {pack_pair<BFLOAT16>(x[0], x[1]), pack_pair<BFLOAT16>(x[2], x[3])};
  }
}

// Of a page that holds 16-bit values as they are.
DEVICE void store_chunk(const Page& page, int token, int chunk) {
  const uint8* sources[2] = {page.block + key_offset(token, chunk),
                             page.block + value_offset(token, chunk * (CHUNK / QUAD))};
  uint16* targets[2] = {page.keys, page.values};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float x[CHUNK];
    unpack_vector<PAGE_BFLOAT16>(*reinterpret_cast<const uint4*>(sources[half]), x);
    uint4* row = reinterpret_cast<uint4*>(targets[half] + token * page.token_stride);
    row[chunk] = pack_vector<BFLOAT16>(x);
  }
}

DEVICE void store_page(const Page& page) {
  if constexpr (BITS == 16) {
    for (int i = threadIdx.x; i < page.tokens * CHUNKS; i += THREADS)
      store_chunk(page, i / CHUNKS, i % CHUNKS);
  } else {
    for (int i = threadIdx.x; i < CODE_BYTES / 16; i += THREADS) {
      const Fragment keys(page.block, i), values(page.block + CODE_BYTES, i);
      store_keys(page, keys);
      store_values(page, values);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) page_gather(const Arguments arguments) {
  const int index = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int start = arguments.starts[sequence] + index * PAGE_TOKENS;
  const int tokens = min(PAGE_TOKENS, arguments.starts[sequence + 1] - start);
  if (tokens <= 0) return;
  const int64 id =
      arguments.page_table[static_cast<int64>(sequence) * arguments.table_width + index];
  const int64 first = (static_cast<int64>(start) * arguments.heads + head) * HEAD_DIM;
  store_page({arguments.pool + (id * KV_HEADS + arguments.first_head + head) * BLOCK_BYTES,
              arguments.keys + first, arguments.values + first, tokens,
              static_cast<int64>(arguments.heads) * HEAD_DIM});
}
