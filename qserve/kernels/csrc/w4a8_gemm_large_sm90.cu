#include "w4a8_gemm_large_sm90.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    w4a8_gemm_large(const __grid_constant__ TensorMap token_map,
                    const __grid_constant__ TensorMap output_map, const Operands operands,
                    int whole_tiles) {
  multiply_tiles(&token_map, operands, whole_tiles, StoredOutputs{&output_map});
}
