"""Every number that Python and CUDA both need, and the index maps of the packed tensors.

`cuda_prelude()` renders the numbers as C++ constants; kernels contain none of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_TOKENS = 64
"""Tokens in one KV cache page."""

WEIGHT_TILE = 32
"""Rows and columns of one tile of packed 4-bit weights: 32 x 32 codes, 512 bytes."""

WEIGHT_ALIGNMENT = 64
"""Both sizes of a quantized linear are multiples of this."""

CODE_MAX = 15
"""Largest unsigned 4-bit code, of weights and of KV."""

ACTIVATION_MAX = 127
"""Largest magnitude of an int8 activation code."""

PROTECTIVE_RANGE = 119
"""Level-1 weights stay within +-119, so that no product or sum of level-2 dequantization leaves
8 bits (QoQ, arXiv 2405.04532, section 4.1; 119 is for zero points rounded before scaling)."""

KV_SCALE_BYTES = 4
"""Bytes of one token's scale and offset for one KV head: two float16."""

GROUP_SIZES = (64, 128)
"""Input channels that may share one level-2 scale."""

GROUP_SCALE_MAX = 17
"""Level-2 scales: round((119 + 119) / 15) at the most, with room for float16 rounding of level 1."""

_SCALE_ORDER = torch.arange(WEIGHT_TILE).reshape(4, 8).T.reshape(-1)
"""Row of a 32-row block at each stored position: 0, 8, 16, 24, 1, 9, ..."""

_SCALE_ORDER_DEEPCOMPRESSOR = (
    torch.arange(WEIGHT_TILE).reshape(2, 2, 8).permute(0, 2, 1).reshape(-1)
)
"""The order DeepCompressor's converter writes: 0, 8, 1, 9, ..., 7, 15, 16, 24, ..."""


def cuda_prelude() -> str:
    """The shared numbers as `constexpr int` lines, to be put before every CUDA source."""
    names = (
        "PAGE_TOKENS",
        "WEIGHT_TILE",
        "WEIGHT_ALIGNMENT",
        "CODE_MAX",
        "ACTIVATION_MAX",
        "PROTECTIVE_RANGE",
        "KV_SCALE_BYTES",
    )
    return "".join(f"constexpr int {name} = {globals()[name]};\n" for name in names)


def pack_weight_codes(codes: Tensor) -> Tensor:
    """Pack 4-bit codes u8 [N, K] into the published QServe order, int8 [N, K/2].

    Row n = 32 nt + 16 a + 8 b + lr and column k = 32 kt + 16 d + 4 e + f go to byte
    (nt * K/32 + kt) * 512 + (lr * 4 + e) * 16 + d * 8 + b * 4 + f, low nibble for a = 0, high for 1.
    """
    rows, columns = codes.shape
    tiles = codes.reshape(rows // 32, 2, 2, 8, columns // 32, 2, 4, 4)
    nibbles = tiles.permute(0, 4, 3, 6, 5, 2, 7, 1).to(torch.uint8)
    packed = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return packed.reshape(rows, columns // 2).view(torch.int8)


def unpack_weight_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_weight_codes`: int8 [N, K/2] to codes u8 [N, K]."""
    rows, half_columns = packed.shape
    tiles = packed.view(torch.uint8).reshape(rows // 32, half_columns // 16, 8, 4, 2, 2, 4)
    nibbles = torch.stack((tiles & 0xF, tiles >> 4), dim=-1)
    codes = nibbles.permute(0, 7, 5, 2, 1, 4, 3, 6)
    return codes.reshape(rows, half_columns * 2).contiguous()


def pack_group_scales(values: Tensor) -> Tensor:
    """Order level-2 values [N, K/g] as the file does: [K/g, N], rows permuted in blocks of 32."""
    return _permute_blocks(values.T, _SCALE_ORDER)


def unpack_group_scales(packed: Tensor, deepcompressor: bool = False) -> Tensor:
    """The inverse of `pack_group_scales`: [K/g, N] to [N, K/g].

    `deepcompressor` reads the order that DeepCompressor's converter writes instead.
    """
    order = _SCALE_ORDER_DEEPCOMPRESSOR if deepcompressor else _SCALE_ORDER
    return _permute_blocks(packed, torch.argsort(order)).T.contiguous()


def _permute_blocks(values: Tensor, order: Tensor) -> Tensor:
    groups, rows = values.shape
    blocks = values.reshape(groups, rows // WEIGHT_TILE, WEIGHT_TILE)
    return blocks[:, :, order.to(values.device)].reshape(groups, rows).contiguous()
