// Eight 16-bit floats at a time, as one 16-byte vector.
#pragma once
#include "convert.cuh"

DEVICE float minus_infinity() { return __uint_as_float(0xFF800000u); }

template <bool BF16>
DEVICE void unpack_vector(uint4 vector, float (&values)[8]) {
  const uint32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = unpack_pair<BF16>(words[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

template <bool BF16>
DEVICE uint4 pack_vector(const float (&values)[8]) {
  return make_uint4(pack_pair<BF16>(values[0], values[1]), pack_pair<BF16>(values[2], values[3]),
                    pack_pair<BF16>(values[4], values[5]), pack_pair<BF16>(values[6], values[7]));
}
