#include "w4a8_gemm_large_sm90.cuh"
#include "tail_large.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    w4a8_gemm_large_norm(const __grid_constant__ TensorMap token_map,
                         const __grid_constant__ TensorMap output_map, const Operands operands,
                         int whole_tiles, const Norm norm, const Quantized out,
                         const uint16* product, Progress* progress) {
  const NormTail tail{norm, out, product, progress, operands.tokens};
  multiply_tiles(&token_map, &output_map, operands, whole_tiles, tail);
}
