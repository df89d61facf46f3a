// One warp, one page: scores, online softmax and weighted values of up to eight query heads.
//
// Both products have pages as the M = 16 operand and query heads on N = 8. A thread's accumulators
// are tokens 8 group .. 8 group + 7 (scores) or channels (outputs) of two heads, 2 column and
// 2 column + 1, where group = lane / 4 and column = lane % 4.
//
// Codes are never converted: the bits of a code alone are a float16 subnormal, code * 2^-24 (16
// times that where the code lies four bits up), which tensor cores multiply exactly. The power of
// two is taken back with the scales, the 16 with the query (K) or the output row (V).
#pragma once
#include "half.cuh"
#include "kv_page.cuh"
#include "tensor_core.cuh"

constexpr float CODE_UNIT = 16777216.0f;
constexpr float ODD_PAIR = BITS == 4 ? 1.0f / 16.0f : 1.0f;
constexpr float WEIGHT_EXPONENT = 6.0f;  // of softmax weights, so that most stay normal in float16
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int GROUP_TOKENS = 8;

// Over the lanes that hold the same heads.
template <class Combine>
DEVICE float reduce_tokens(float x, Combine combine) {
#pragma unroll
  for (int lane = 4; lane < 32; lane *= 2) x = combine(x, __shfl_xor_sync(FULL_WARP, x, lane));
  return x;
}

DEVICE float reduce_sum(float x) {
  return reduce_tokens(x, [](float a, float b) { return a + b; });
}

DEVICE float reduce_max(float x) {
  return reduce_tokens(x, [](float a, float b) { return fmaxf(a, b); });
}

// Codes 2 index and 2 index + 1 of eight, as a pair of subnormals.
DEVICE uint32 code_pair(const uint32 (&words)[4], int unit, int odd_token, int index) {
  if (BITS == 4) {
    const uint32 word = words[unit * 2 + odd_token] >> index / 2 * 8;
    return word & (index % 2 ? 0x00F000F0u : 0x000F000Fu);
  }
  return words[odd_token * 2 + index / 2] >> index % 2 * 8 & 0x00FF00FFu;
}

DEVICE void load_fragments(uint32 (&words)[4], uint32 codes, int pair, int load) {
  const uint4 v = load_shared_16(codes + fragment_offset(pair, load, threadIdx.x % 32));
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// The queries of a tile: fragments, and for K's offsets the sum of each head's elements.
struct Query {
  uint32 fragments[2 * K_STEPS];
  float score_unit;  // score of one unit of q . k, in powers of two
  float sum[2];      // of heads 2 column and 2 column + 1, in score units

  // first: the tile's first head, of which `rows` are valid.
  __device__ __forceinline__ void load(const uint16* first, int rows, float unit) {
    const int group = threadIdx.x % 32 / 4, column = threadIdx.x % 4;
    const uint4* channels =
        reinterpret_cast<const uint4*>(first + group * HEAD_DIM + column * (HEAD_DIM / 4));
    float total = 0;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      float values[8];
      unpack_vector<BFLOAT16>(group < rows ? channels[i] : uint4{}, values);
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        const float low = values[2 * pair], high = values[2 * pair + 1];
        const float factor = pair % 2 ? ODD_PAIR : 1.0f;
        fragments[4 * i + pair] = pack_pair<false>(low * factor, high * factor);
        total += low + high;
      }
    }
    total += __shfl_xor_sync(FULL_WARP, total, 1);
    total += __shfl_xor_sync(FULL_WARP, total, 2);
    score_unit = unit;
    sum[0] = unit * __shfl_sync(FULL_WARP, total, column * 8);
    sum[1] = unit * __shfl_sync(FULL_WARP, total, column * 8 + 4);
  }
};

// A (scale, offset) each for the eight tokens of a thread.
struct TokenScales {
  uint32 pairs[GROUP_TOKENS];

  __device__ __forceinline__ void load(uint32 scales) {
    const uint32 address = scales + threadIdx.x % 32 / 4 * GROUP_TOKENS * KV_SCALE_BYTES;
    const uint4 low = load_shared_16(address), high = load_shared_16(address + 16);
    pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
    pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
  }

  // Whatever lies in memory there, even NaN, becomes zero.
  __device__ __forceinline__ void hide(uint32 visible) {
#pragma unroll
    for (int i = 0; i < GROUP_TOKENS; i++)
      if (!(visible >> i & 1)) pairs[i] = 0;
  }

  __device__ __forceinline__ float2 at(int i) const { return unpack_pair<false>(pairs[i]); }
};

// Bit i: the page's token 8 group + i lies in [begin, end).
DEVICE uint32 visible_tokens(int begin, int end) {
  const int first = threadIdx.x % 32 / 4 * GROUP_TOKENS;
  const int from = min(max(begin - first, 0), GROUP_TOKENS);
  const int to = min(max(end - first, 0), GROUP_TOKENS);
  return (1u << to) - 1 & ~((1u << from) - 1);
}

// What a warp has seen of a piece of work. Weights are 2^(score - maximum + WEIGHT_EXPONENT).
struct Attention {
  float maximum[2], weights[2], offsets[2];  // offsets: sum of weight * V's offset
  float output[K_STEPS][4];                  // sum of weight * V's scale * code

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int head = 0; head < 2; head++)
      maximum[head] = minus_infinity(), weights[head] = offsets[head] = 0;
#pragma unroll
    for (int i = 0; i < K_STEPS; i++) output[i][0] = output[i][1] = output[i][2] = output[i][3] = 0;
  }

  __device__ __forceinline__ void raise_maximum(float first, float second) {
    first = fmaxf(maximum[0], reduce_max(first)), second = fmaxf(maximum[1], reduce_max(second));
    if (!__any_sync(FULL_WARP, first != maximum[0] || second != maximum[1])) return;
    const float shrink[2] = {power_of_two(maximum[0] - first), power_of_two(maximum[1] - second)};
    maximum[0] = first, maximum[1] = second;
#pragma unroll
    for (int head = 0; head < 2; head++) {
      weights[head] *= shrink[head], offsets[head] *= shrink[head];
#pragma unroll
      for (int i = 0; i < K_STEPS; i++)
        output[i][head] *= shrink[head], output[i][2 + head] *= shrink[head];
    }
  }
};

// scores[p]: tokens 2 p and 2 p + 1 of the thread's eight, each for two heads; K's codes times q.
DEVICE void multiply_keys(float (&scores)[4][4], uint32 keys, const Query& query) {
#pragma unroll
  for (int load = 0; load < LOADS; load++) {
    uint32 words[4][4];
#pragma unroll
    for (int pair = 0; pair < 4; pair++) load_fragments(words[pair], keys, pair, load);
#pragma unroll
    for (int step = 0; step < 2 * UNITS; step++) {
      const int unit = step / 2, index = step % 2 * 2, fragment = (load * UNITS + unit) * 4 + index;
#pragma unroll
      for (int pair = 0; pair < 4; pair++)
        multiply(scores[pair], code_pair(words[pair], unit, 0, index),
                 code_pair(words[pair], unit, 1, index), code_pair(words[pair], unit, 0, index + 1),
                 code_pair(words[pair], unit, 1, index + 1), query.fragments[fragment],
                 query.fragments[fragment + 1]);
    }
  }
}

DEVICE void multiply_values(Attention& attention, uint32 values,
                            const uint32 (&weights)[GROUP_TOKENS]) {
#pragma unroll
  for (int pair = 0; pair < 4; pair++)
#pragma unroll
    for (int load = 0; load < LOADS; load++) {
      uint32 words[4];
      load_fragments(words, values, pair, load);
#pragma unroll
      for (int step = 0; step < 2 * UNITS; step++) {
        const int unit = step / 2, index = step % 2 * 2;
        multiply(attention.output[load * UNITS * 2 + step], code_pair(words, unit, 0, index),
                 code_pair(words, unit, 0, index + 1), code_pair(words, unit, 1, index),
                 code_pair(words, unit, 1, index + 1), weights[2 * pair], weights[2 * pair + 1]);
      }
    }
}

// block: the page's address in shared memory, of whose tokens [begin, end) are seen.
DEVICE void attend_page(Attention& attention, uint32 block, int begin, int end,
                        const Query& query) {
  float scores[4][4] = {};
  multiply_keys(scores, block, query);
  TokenScales keys, values;
  keys.load(block + SCALE_OFFSET);
  values.load(block + SCALE_OFFSET + SCALE_BYTES);
  const bool partial = begin > 0 || end < PAGE_TOKENS;
  const uint32 visible = partial ? visible_tokens(begin, end) : 0xFFu;
  if (partial) keys.hide(visible), values.hide(visible);
  const float unit = query.score_unit * CODE_UNIT;
  float maximum[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
  for (int i = 0; i < GROUP_TOKENS; i++) {
    const float2 scale = keys.at(i);
#pragma unroll
    for (int head = 0; head < 2; head++) {
      float& score = scores[i / 2][i % 2 * 2 + head];
      score = fmaf(scale.x * unit, score, scale.y * query.sum[head]);
      if (partial && !(visible >> i & 1)) score = minus_infinity();
      maximum[head] = fmaxf(maximum[head], score);
    }
  }
  attention.raise_maximum(maximum[0], maximum[1]);
  const float shift[2] = {WEIGHT_EXPONENT - attention.maximum[0],
                          WEIGHT_EXPONENT - attention.maximum[1]};
  uint32 weights[GROUP_TOKENS];
#pragma unroll
  for (int i = 0; i < GROUP_TOKENS; i++) {
    const float2 scale = values.at(i);
    float weight[2];
#pragma unroll
    for (int head = 0; head < 2; head++) {
      weight[head] = power_of_two(scores[i / 2][i % 2 * 2 + head] + shift[head]);
      attention.weights[head] += weight[head];
      attention.offsets[head] = fmaf(weight[head], scale.y, attention.offsets[head]);
    }
    weights[i] = transpose(pack_pair<false>(weight[0] * scale.x, weight[1] * scale.x));
  }
  multiply_values(attention, block + CODE_BYTES, weights);
}
