// RoPE, optional center and Hadamard, quantize and paged write of the new tokens, in one pass: a
// thread holds a chunk of either half of one head, so that RoPE needs no exchange. A warp's heads
// are all of one role (query, key or value).
//
// A warp mostly waits, for loads and for its own results: small shares of a head and few registers,
// so that an SM holds many warps, are worth more than the instructions they cost.
#include "half.cuh"
#include "kv_page.cuh"

constexpr int LANES = CHUNKS / 2;  // threads that hold one head
constexpr int HEADS_PER_WARP = 32 / LANES;
constexpr int QUERY_WARPS = (QUERY_HEADS + HEADS_PER_WARP - 1) / HEADS_PER_WARP;
constexpr int KV_WARPS = (KV_HEADS + HEADS_PER_WARP - 1) / HEADS_PER_WARP;
constexpr int TOKEN_WARPS = QUERY_WARPS + 2 * KV_WARPS;
constexpr int QKV_HEADS = QUERY_HEADS + 2 * KV_HEADS;
#if __CUDA_ARCH__ >= 900
constexpr int BLOCKS_PER_SM = 1536 / THREADS;  // leaves 40 registers a thread
#else
constexpr int BLOCKS_PER_SM = 1280 / THREADS;  // 48, which sm_80 needs
#endif
constexpr float HALF_MAX = 65504.0f;

// Makes the Hadamard matrix orthonormal; it is applied with the rotation, whose factors are there
// before x is.
constexpr float NORM = !HADAMARD ? 1.0f : HEAD_DIM == 128 ? 0.08838834764831845f : 0.125f;

// Added to a small float, it leaves the nearest (even) integer in the sum's low bits: cheaper than
// the conversion, of which an SM does sixteen a cycle.
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23
constexpr uint32 ROUNDER_BITS = 0x4B400000u;

struct Arguments {
  const uint16* qkv;
  const float* rope_table;
  const float* key_center;
  const int64* positions;
  const int64* slots;
  uint8* pool;
  uint16* q;
  int tokens;
};

// One thread's part of a head.
struct Channels {
  float chunks[2][CHUNK];

  template <class Body>
  __device__ __forceinline__ void each(Body body) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < CHUNK; j++) body(chunks[i][j]);
  }
};

// The number of a thread's i-th chunk. Of queries and keys, the two are RoPE's; of values,
// neighbouring lanes take chunks that are stored in the same 16 bytes.
template <bool VALUE>
DEVICE int own_chunk(int lane, int i) {
  const int place = lane + i * LANES;
  return VALUE ? place / 8 * 8 + place % 8 / 2 + place % 2 * 4 : place;
}

template <bool VALUE>
DEVICE void load_channels(Channels& x, const uint16* head, int lane) {
  uint4 vectors[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    vectors[i] = reinterpret_cast<const uint4*>(head)[own_chunk<VALUE>(lane, i)];
#pragma unroll
  for (int i = 0; i < 2; i++) unpack_vector<BFLOAT16>(vectors[i], x.chunks[i]);
}

template <bool BF16, bool VALUE>
DEVICE void store_channels(uint16* head, int lane, const Channels& x) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    reinterpret_cast<uint4*>(head)[own_chunk<VALUE>(lane, i)] = pack_vector<BF16>(x.chunks[i]);
}

DEVICE void load_chunk(float (&x)[CHUNK], const float* row, int chunk) {
  const float4* vectors = reinterpret_cast<const float4*>(row) + chunk * 2;
  const float4 a = __ldg(vectors), b = __ldg(vectors + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// The cosines and sines that a thread needs.
struct Rotation {
  float cosines[CHUNK], sines[CHUNK];

  // row: HEAD_DIM / 2 cosines, then as many sines.
  __device__ __forceinline__ void load(const float* row, int lane) {
    load_chunk(cosines, row, lane);
    load_chunk(sines, row + HEAD_DIM / 2, lane);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) cosines[j] *= NORM, sines[j] *= NORM;
  }
};

// Every product and sum is rounded by itself, as the reference's are (but for NORM).
DEVICE void rotate(Channels& x, const Rotation& rotation) {
#pragma unroll
  for (int j = 0; j < CHUNK; j++) {
    const float first = x.chunks[0][j], second = x.chunks[1][j];
    const float cosine = rotation.cosines[j], sine = rotation.sines[j];
    x.chunks[0][j] = __fsub_rn(__fmul_rn(first, cosine), __fmul_rn(second, sine));
    x.chunks[1][j] = __fadd_rn(__fmul_rn(second, cosine), __fmul_rn(first, sine));
  }
}

DEVICE void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b, a = sum;
}

// The Sylvester matrix: one butterfly per bit of the channel's index.
DEVICE void apply_hadamard(Channels& x, int lane) {
#pragma unroll
  for (int bit = 1; bit < CHUNK; bit *= 2)
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < CHUNK; j++)
        if (!(j & bit)) butterfly(x.chunks[i][j], x.chunks[i][j | bit]);
#pragma unroll
  for (int j = 0; j < CHUNK; j++) butterfly(x.chunks[0][j], x.chunks[1][j]);
#pragma unroll
  for (int bit = 1; bit < LANES; bit *= 2) {
    const float sign = lane & bit ? -1.0f : 1.0f;
    x.each(
        [&](float& value) { value = fmaf(sign, value, __shfl_xor_sync(FULL_WARP, value, bit)); });
  }
}

DEVICE void subtract(Channels& x, const float* center, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float values[CHUNK];
    load_chunk(values, center, lane + i * LANES);
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
      x.chunks[i][j] = __fsub_rn(x.chunks[i][j], __fmul_rn(values[j], NORM));
  }
}

// How one head of one token is coded: x ~ scale * code + offset.
struct Grid {
  float offset, inverse;
  uint32 scale_and_offset;

  // In the low bits of ROUNDER's.
  __device__ __forceinline__ uint32 code(float value) const {
    const float steps = __fmul_rn(__fsub_rn(value, offset), inverse);
    return __float_as_uint(__fadd_rn(fminf(fmaxf(steps, 0.0f), (1 << BITS) - 1), ROUNDER));
  }
};

// Codes and ROUNDER's bits, shifted and added up, less ROUNDER's.
struct Packed {
  uint32 word = 0, surplus = 0;  // surplus: known to the compiler

  __device__ __forceinline__ void add(uint32 code, int shift) {
    word += code << shift, surplus += ROUNDER_BITS << shift;
  }
  __device__ __forceinline__ uint32 codes() const { return word - surplus; }
};

DEVICE Grid fit_grid(Channels& x) {
  float low = x.chunks[0][0], high = low;
  x.each([&](float& value) { low = fminf(low, value), high = fmaxf(high, value); });
#pragma unroll
  for (int bit = 1; bit < LANES; bit *= 2) {
    low = fminf(low, __shfl_xor_sync(FULL_WARP, low, bit));
    high = fmaxf(high, __shfl_xor_sync(FULL_WARP, high, bit));
  }
  const float step = fminf(__fdiv_rn(__fsub_rn(high, low), (1 << BITS) - 1), HALF_MAX);
  const float offset = fminf(fmaxf(low, -HALF_MAX), HALF_MAX);
  const uint32 rounded = pack_pair<false>(step, offset);
  const float2 pair = unpack_pair<false>(rounded);
  return {pair.y, pair.x > 0.0f ? __frcp_rn(pair.x) : 0.0f, rounded};
}

// Channels 0..7 of a chunk go to nibbles 0, 4, 1, 5, 2, 6, 3, 7, or to bytes 0, 2, 1, 3, 4, 6, 5,
// 7: neighbours lie 16 bits apart, where one AND makes a pair of them.
DEVICE void store_key_chunk(uint8* block, int token, int chunk, const float (&x)[CHUNK],
                            const Grid& grid) {
  Packed words[2];
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    const int shift = i % 2 * 16 + (BITS == 4 ? i / 2 * 4 : i % 4 / 2 * 8);
    words[BITS == 4 ? 0 : i / 4].add(grid.code(x[i]), shift);
  }
  uint8* target = block + key_offset(token, chunk);
  if (BITS == 4)
    *reinterpret_cast<uint32*>(target) = words[0].codes();
  else
    *reinterpret_cast<uint2*>(target) = make_uint2(words[0].codes(), words[1].codes());
}

DEVICE void store_value_chunk(uint8* block, int token, int chunk, const float (&x)[CHUNK],
                              const Grid& grid) {
#pragma unroll
  for (int first = 0; first < CHUNK; first += QUAD) {
    Packed quad;
#pragma unroll
    for (int i = 0; i < QUAD; i++) quad.add(grid.code(x[first + i]), i * BITS);
    uint16* target =
        reinterpret_cast<uint16*>(block + value_offset(token, (chunk * CHUNK + first) / QUAD));
    target[0] = quad.codes();
    if (BITS == 8) target[2] = quad.codes() >> 16;
  }
}

template <bool KEY>
DEVICE void store_quantized(uint8* block, int token, int lane, const Channels& x,
                            const Grid& grid) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int chunk = own_chunk<!KEY>(lane, i);
    if (KEY)
      store_key_chunk(block, token, chunk, x.chunks[i], grid);
    else
      store_value_chunk(block, token, chunk, x.chunks[i], grid);
  }
  if (lane == 0)
    *reinterpret_cast<uint32*>(block + scale_offset(!KEY, token)) = grid.scale_and_offset;
}

template <bool KEY>
DEVICE void append(const Arguments& arguments, int token, int head, int lane, Channels& x) {
  const int64 slot = arguments.slots[token];
  const int place = slot % PAGE_TOKENS;
  uint8* block = arguments.pool + (slot / PAGE_TOKENS * KV_HEADS + head) * BLOCK_BYTES;
  if constexpr (BITS == 16) {
    uint8* row = block + (KEY ? key_offset(place, 0) : value_offset(place, 0));
    if (head < KV_HEADS) store_channels<PAGE_BFLOAT16, !KEY>(reinterpret_cast<uint16*>(row), lane, x);
  } else {
    const Grid grid = fit_grid(x);
    if (head < KV_HEADS) store_quantized<KEY>(block, place, lane, x, grid);
  }
}

// Positions and the table are older than the preceding kernel, which makes qkv.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    rope_append(const Arguments arguments) {
  launch_dependents();
  const int warp = blockIdx.x * (THREADS / 32) + warp_index();
  const int token = warp / TOKEN_WARPS, unit = warp % TOKEN_WARPS;
  if (token >= arguments.tokens) return;
  const int lane = threadIdx.x % LANES, within = threadIdx.x % 32 / LANES;
  const int role = unit < QUERY_WARPS ? 0 : unit < QUERY_WARPS + KV_WARPS ? 1 : 2;
  const int first_warp = role == 0 ? 0 : QUERY_WARPS + (role - 1) * KV_WARPS;
  const int head = (unit - first_warp) * HEADS_PER_WARP + within;
  const int heads = role == 0 ? QUERY_HEADS : KV_HEADS;
  const int first_head = role == 0 ? 0 : QUERY_HEADS + (role - 1) * KV_HEADS;
  // Surplus lanes of a role's last warp repeat its last head, and store nothing.
  const int64 row = static_cast<int64>(token) * QKV_HEADS + first_head + min(head, heads - 1);
  Rotation rotation;
  if (role < 2) rotation.load(arguments.rope_table + arguments.positions[token] * HEAD_DIM, lane);
  wait_for_predecessor();
  Channels x;
  const uint16* source = arguments.qkv + row * HEAD_DIM;
  if (role == 2) {
    load_channels<true>(x, source, lane);
    return append<false>(arguments, token, head, lane, x);
  }
  load_channels<false>(x, source, lane);
  rotate(x, rotation);
  if (CENTERED && role == 1)
    subtract(x, arguments.key_center + min(head, KV_HEADS - 1) * HEAD_DIM, lane);
  if (HADAMARD) apply_hadamard(x, lane);
  if (role == 1) return append<true>(arguments, token, head, lane, x);
  if (head >= QUERY_HEADS) return;
  const int64 query = static_cast<int64>(token) * QUERY_HEADS + head;
  store_channels<BFLOAT16, false>(arguments.q + query * HEAD_DIM, lane, x);
}
