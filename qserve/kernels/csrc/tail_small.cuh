// What follows a GEMM and needs whole rows of its output, in the same launch: residual add, RMSNorm
// and quantization. The first blocks, once they have stored their own tiles, share out the rows.
//
// Nobody signals. Outputs go to an inbox, where NOTHING stands as long as there is none: a row has come
// when all of its words have. Who takes a row leaves NOTHING behind, for the next launch.
#pragma once
#include "rows.cuh"

static_assert(THREADS <= FINISHING_THREADS, "a row takes more threads than a block has");

// Two NaNs of a kind that no conversion gives.
constexpr uint32 NOTHING = 0xFFFFFFFFu;

DEVICE int block_index() { return blockIdx.y * gridDim.x + blockIdx.x; }

DEVICE bool complete(const uint4& v) {
  return v.x != NOTHING && v.y != NOTHING && v.z != NOTHING && v.w != NOTHING;
}

// Waits for a row, and takes it out of the inbox.
DEVICE void take(Fetched<uint16>& fetched, uint16* row) {
  bool all;
  do {
    all = true;
    each_vector([&](int i, int vector) { fetched.at[i][0] = load_relaxed_16(row + vector * WIDTH); });
    each_vector([&](int i, int) { all = all && complete(fetched.at[i][0]); });
  } while (!all);
  each_vector([&](int, int vector) {
    reinterpret_cast<uint4*>(row)[vector] = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
  });
}

// Called by the threads that have stored the tile; there are at least as many rows as workers.
DEVICE void finish_rows(const Norm& norm, const Quantized& out, uint16* inbox, int rows,
                        int workers) {
  if (block_index() >= workers || threadIdx.x >= THREADS) return;
  for (int64 row = block_index(); row < rows; row += workers) {
    NormRow norm_row(norm);
    norm_row.fetch_residual(row);
    take(norm_row.x, inbox + row * COLUMNS);
    Values values;
    norm_row.normalize(values, row);
    quantize_row(values, out, row);
  }
}
