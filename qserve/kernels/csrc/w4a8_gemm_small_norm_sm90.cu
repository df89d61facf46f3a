#include "w4a8_gemm_small_sm90.cuh"
#include "tail_small.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS_PER_MULTIPROCESSOR)
    w4a8_gemm_small_norm(const __grid_constant__ TensorMap token_map, const Operands operands,
                         uint16* inbox, const Norm norm, const Quantized out, int workers) {
  multiply_tile(&token_map, operands, inbox);
  if (threadIdx.x < CONSUMER_THREADS) finish_rows(norm, out, inbox, operands.tokens, workers);
  await_peers();
}
