#include "w4a8_gemm_large_sm90.cuh"
#include "tail_large.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    w4a8_gemm_large_norm(const __grid_constant__ TensorMap token_map, const Operands operands,
                         int whole_tiles, const Norm norm, const Quantized out,
                         uint2* inboxes, Turns* turns) {
  multiply_tiles(&token_map, operands, whole_tiles,
                 NormedOutputs(norm, out, inboxes, turns, operands.tokens));
}
