// Rounds a block of a weight's columns in turn; each error moves the columns of the block that
// follow. A thread per row of the weight, which keeps that row's part of the block in registers.
#include "ptx.cuh"

constexpr int THREADS = 128;

struct Arguments {
  const float* block;  // [COLUMNS, rows], as are all but the factor
  const float* step;
  const float* zero;
  const float* top;
  const float* factor;  // [COLUMNS, COLUMNS], upper triangular
  float* codes;
  float* errors;
  int rows;
};

extern __shared__ uint8 shared_memory[];

// All threads of the block get the factor's copy in shared memory.
DEVICE const float* load_factor(const float* source) {
  float* factor = reinterpret_cast<float*>(shared_memory);
  for (int i = threadIdx.x; i < COLUMNS * COLUMNS; i += THREADS) factor[i] = source[i];
  __syncthreads();
  return factor;
}

extern "C" __global__ void __launch_bounds__(THREADS) round_columns(const Arguments arguments) {
  const float* factor = load_factor(arguments.factor);
  const int row = blockIdx.x * THREADS + threadIdx.x, rows = arguments.rows;
  if (row >= rows) return;
  float values[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) values[i] = arguments.block[int64(i) * rows + row];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    const int64 at = int64(i) * rows + row;
    const float step = arguments.step[at], zero = arguments.zero[at];
    const float nearest = rintf(values[i] / step + zero);
    const float code = fminf(fmaxf(nearest, 0.0f), arguments.top[at]);
    const float error = (values[i] - (code - zero) * step) / factor[i * COLUMNS + i];
    arguments.codes[at] = code;
    arguments.errors[at] = error;
#pragma unroll
    for (int j = i + 1; j < COLUMNS; j++) values[j] -= factor[i * COLUMNS + j] * error;
  }
}
