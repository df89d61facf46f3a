// The emulator's own csrc/tensor_core.cuh.
#pragma once
#include "convert.cuh"

DEVICE float half_of(uint32 pair, int index) { return from_half<false>(pair >> index * 16); }

// Element (row, k) of the first operand and (k, column) of the second, from the lanes that hold
// them.
DEVICE float element_a(const emulator::Lanes& lanes, int row, int k) {
  return half_of(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
}

DEVICE float element_b(const emulator::Lanes& lanes, int k, int column) {
  return half_of(lanes[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
}

DEVICE void multiply(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                     uint32 b1) {
  const emulator::Words product = emulator::warp_wide(
      "mma", {a0, a1, a2, a3, b0, b1}, [](const emulator::Lanes& lanes, int lane) {
        emulator::Words sums = {};
        for (int i = 0; i < 4; i++) {
          double sum = 0;
          for (int k = 0; k < 16; k++)
            sum += double(element_a(lanes, lane / 4 + i / 2 * 8, k)) *
                   element_b(lanes, k, lane % 4 * 2 + i % 2);
          sums[i] = emulator::to_word(float(sum));
        }
        return sums;
      });
  for (int i = 0; i < 4; i++) c[i] += emulator::from_word<float>(product[i]);
}

DEVICE uint32 transpose(uint32 x) {
  return emulator::warp_wide("movmatrix", {x}, [](const emulator::Lanes& lanes, int lane) {
    const auto element = [&](int row, int column) {
      return lanes[row * 4 + column / 2][0] >> column % 2 * 16 & 0xFFFF;
    };
    const int row = lane % 4 * 2, column = lane / 4;
    return emulator::Words{element(row, column) | element(row + 1, column) << 16};
  })[0];
}
