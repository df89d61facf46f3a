"""Descriptions of matrices for Hopper's copy engine."""

from __future__ import annotations

import struct
from functools import lru_cache

from torch import Tensor

from qserve.kernels.jit import KernelError, driver


def tensor_map(matrix: Tensor, box: tuple[int, int]) -> bytes:
    """The copy engine's description of a row-major matrix, for a `128s` parameter (sm_90).

    box: rows and columns of one copy, columns spanning 128 bytes, the width of the swizzle.
    Reads beyond the matrix give zeros, writes beyond it are dropped.
    """
    rows, columns = matrix.shape
    pitch = matrix.stride(0) * matrix.element_size()
    return _encode_tensor_map(matrix.data_ptr(), matrix.element_size(), rows, columns, pitch, box)


@lru_cache(maxsize=4096)
def _encode_tensor_map(
    address: int, element_size: int, rows: int, columns: int, pitch: int, box: tuple[int, int]
) -> bytes:
    cuda = driver()
    types = cuda.CUtensorMapDataType
    element = {
        1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16,
    }[element_size]
    long, short = cuda.cuuint64_t, cuda.cuuint32_t
    status, encoded = cuda.cuTensorMapEncodeTiled(
        element,
        2,
        address,
        [long(columns), long(rows)],
        [long(pitch)],
        [short(box[1]), short(box[0])],
        [short(1), short(1)],
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise KernelError(f"tensor map of {rows} x {columns}, box {box}: {status.name}")
    return struct.pack("16Q", *(int(word) for word in encoded.opaque))
