"""A GEMM that goes on with the norm after it, in one launch; the contract is in `gemm_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.gemm import PreparedWeight, check_linear
from qserve.kernels.gemm_cuda import INBOX_OUTPUTS, CudaWeight
from qserve.kernels.gemm_variants import INBOX_PARTS, Norm
from qserve.kernels.tiles import Tile

COLUMNS = range(2048, 8193)
"""Of the norm: shorter rows are too little work for what it costs to wait, longer ones cost registers."""

ROWS_PER_WORKER = 2
"""Of a GEMM of few tokens: rows that a block may have to do one after the other."""

NORM_TILES = (Tile("large", 128, 128), Tile("large", 128, 256))
"""Of many tokens."""


def fuses(x: QuantizedActivation, weight: PreparedWeight) -> bool:
    """Whether one launch was measured to take about as long as two, or less (docs/kernels.md)."""
    tokens, columns = x.codes.shape[0], weight.shape[0]
    if columns not in COLUMNS or tokens == 0 or not isinstance(weight, CudaWeight):
        return False
    tile = tile_for(tokens, weight)
    if not has_room(tokens, weight, tile):
        return False
    if tile.kind == "small":
        return tokens <= ROWS_PER_WORKER * weight.norm_workers(tokens, tile)
    # Whole token tiles at once may leave more blocks idle than the GEMM alone does.
    waves = -(-tokens // (tile.tokens * weight.token_tiles_at_once(tile)))
    return waves <= weight.waves(tokens, weight.tile_for(tokens))


def tile_for(tokens: int, weight: CudaWeight) -> Tile:
    """The GEMM's own; but of the "large" ones, those of 128 rows whose blocks are in no cluster."""
    tile = weight.tile_for(tokens)
    if tile.kind != "large" or tile in NORM_TILES:
        return tile
    return NORM_TILES[1]


def has_room(tokens: int, weight: CudaWeight, tile: Tile) -> bool:
    """Whether there is a kernel that goes on with a norm, and what its blocks share is large enough."""
    columns = weight.shape[0]
    if tile.kind == "small":
        return tokens * columns <= INBOX_OUTPUTS
    if tile not in NORM_TILES or weight.token_tiles_at_once(tile) == 0:
        return False
    padded, parts = -(-tokens // tile.tokens) * tile.tokens, -(-columns // tile.rows)
    return padded * parts <= INBOX_PARTS


def linear_rms_norm_quantize(
    x: QuantizedActivation,
    weight: PreparedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    norm_weight: Tensor,
    eps: float,
    residual: Tensor,
    tile: Tile | None = None,
) -> tuple[QuantizedActivation, Tensor]:
    """See `gemm_norm`; as many tokens as `has_room`. tile: not the fastest for the GEMM alone."""
    assert isinstance(weight, CudaWeight)
    contract = check_linear(x, weight.shape, bias, out_dtype)
    contract.check("norm_weight", norm_weight, (weight.shape[0],), torch.float32, out_dtype)
    contract.check("residual", residual, ("M", weight.shape[0]), out_dtype)
    contract.require(residual.is_contiguous(), "residual must be contiguous")
    tokens, columns = residual.shape
    tile = tile or tile_for(tokens, weight)
    contract.require(has_room(tokens, weight, tile), f"{tokens} tokens are too many for {tile}")
    total = torch.empty_like(residual)
    out = QuantizedActivation.empty(tokens, columns, residual.device)
    at_once = weight.token_tiles_at_once(tile) if tile.kind == "large" else 1
    norm = Norm(columns, norm_weight.dtype == torch.float32, at_once)
    fields = (residual, norm_weight, total, eps, out.codes, out.scale, out.row_sum)
    weight.apply_with_norm(x, bias, out_dtype, tile, norm, fields)
    return out, total
