// The ops that make a linear's int8 input. One block holds one token's row in registers, so every
// value is read once and written once.
#include "rows.cuh"

// Weights never change, so what does not depend on the predecessor need not wait for it. The residual
// may still change, but only on its way through the L2 cache.
DEVICE void normalize(Values& values, const uint16* x, const Norm& norm) {
  launch_dependents();
  if (threadIdx.x == 0 && norm.residual != nullptr)
    prefetch(norm.residual + static_cast<int64>(blockIdx.x) * COLUMNS, COLUMNS * sizeof(uint16));
  NormRow row(norm);
  wait_for_predecessor();
  row.fetch_residual(blockIdx.x);
  row.fetch_x(x, blockIdx.x);
  row.normalize(values, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const uint16* x, const Norm norm, uint16* normed) {
  Values values;
  normalize(values, x, norm);
  values.each([&](int vector, float(&v)[WIDTH]) {
    store_vector(normed + static_cast<int64>(blockIdx.x) * COLUMNS, vector, v);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_quantize(const uint16* x, const Norm norm, Quantized out) {
  Values values;
  normalize(values, x, norm);
  quantize_row(values, out, blockIdx.x);
}

// Registers for two blocks on a multiprocessor with all of their loads in flight; with more a thread,
// only one fits, and to use fewer the compiler puts loads off.
extern "C" __global__ void __launch_bounds__(THREADS, PER_THREAD <= 4 ? 2 : 1)
    silu_mul_quantize(const uint16* gate_up, Quantized out) {
  launch_dependents();
  wait_for_predecessor();
  Values values;
  silu_mul_row(values, gate_up + static_cast<int64>(blockIdx.x) * 2 * COLUMNS);
  quantize_row(values, out, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_per_token(const uint16* x, Quantized out) {
  launch_dependents();
  wait_for_predecessor();
  Values values;
  values.each([&](int vector, float(&v)[WIDTH]) {
    load_vector(v, x + static_cast<int64>(blockIdx.x) * COLUMNS, vector);
  });
  quantize_row(values, out, blockIdx.x);
}
