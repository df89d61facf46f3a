#include "w4a8_gemm_small_sm90.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS_PER_MULTIPROCESSOR)
    w4a8_gemm_small(const __grid_constant__ TensorMap token_map, const Operands operands,
                    uint16* output) {
  multiply_tile(&token_map, operands, output);
  await_peers();
}
