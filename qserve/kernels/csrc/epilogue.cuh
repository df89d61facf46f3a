// From int32 accumulators to 16-bit outputs, rounded exactly as the reference rounds.
#pragma once
#include "half.cuh"

// What the kernel is given beside the tiles. Row arrays cover the padded rows, `bias` only N.
struct Operands {
  const uint8* weight;
  const float* row_scale;
  const float* row_zero;  // per-channel zero points; unused otherwise
  const void* bias;       // of the output's type, or float; unused without HAS_BIAS
  const float* token_scale;
  const int* token_sum;
  int tokens, rows, columns, k_blocks, bias_is_float;
};

struct Row {
  float scale, zero, bias;
};

struct Token {
  float scale;
  int sum;
};

DEVICE float load_bias(const Operands& operands, int row) {
  if (!HAS_BIAS) return 0;
  row = min(row, operands.rows - 1);  // what would be beyond is never stored
  if (operands.bias_is_float) return static_cast<const float*>(operands.bias)[row];
  return unpack_pair<BFLOAT16>(static_cast<const uint16*>(operands.bias)[row]).x;
}

DEVICE Row load_row(const Operands& operands, int row) {
  return {operands.row_scale[row], HAS_ZEROS ? operands.row_zero[row] : 0.0f,
          load_bias(operands, row)};
}

DEVICE Token load_token(const Operands& operands, int token) {
  if (token >= operands.tokens) return {0.0f, 0};
  return {operands.token_scale[token], operands.token_sum[token]};
}

// Takes off what every weight has too much: a zero point, or the 128 that makes a byte unsigned.
DEVICE float without_offset(int accumulator, const Row& row, const Token& token) {
  if (FRACTIONAL_ZEROS) {
    const double offset = __dmul_rn(token.sum, row.zero);
    return __double2float_rn(__dsub_rn(accumulator, offset));
  }
  const int offset = HAS_ZEROS ? static_cast<int>(row.zero) : WEIGHT_OFFSET;
  return __int2float_rn(accumulator - offset * token.sum);
}

DEVICE float finish(int accumulator, const Row& row, const Token& token) {
  const float scaled = __fmul_rn(without_offset(accumulator, row, token), row.scale);
  const float output = __fmul_rn(scaled, token.scale);
  return HAS_BIAS ? __fadd_rn(output, row.bias) : output;
}
