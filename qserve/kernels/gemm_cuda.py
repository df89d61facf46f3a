"""Quantized linears on a GPU: weights repacked at load, a tile chosen per batch, one launch.

Hopper runs two wgmma kernels, for few and for many tokens; every GPU from sm_80 on runs the
mma.sync kernel. All read the same packed weights and give the same bits as the CPU reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qserve.formats import layout
from qserve.formats.activation import QuantizedActivation
from qserve.formats.weight import QuantizedWeight, W4Weight
from qserve.kernels.gemm_variants import (
    BLOCK,
    INBOX_PARTS,
    SLAB_ROWS,
    Norm,
    Policy,
    gemm_kernel,
)
from qserve.kernels.jit import device_arch
from qserve.kernels.op import OpError
from qserve.kernels.tensor_map import tensor_map
from qserve.kernels.tiles import Device, Problem, Tile, choose

MAX_COLUMNS = 65536
"""Up to here no sum of 8-bit products leaves int32."""

INBOX_OUTPUTS = 256 * 8192
"""Of a GEMM of few tokens that goes on with a norm, at most."""

TOKENS_WORTH_ROOM = 64
"""Tiles of fewer tokens lose little where a matrix ends, and would have much to read behind one token."""


@dataclass(frozen=True)
class CudaWeight:
    """A 4- or 8-bit weight on a GPU.

    packed: uint8, blocks of 128 x 128 (see csrc/weight.cuh). scale: float32 [N padded].
    zero: float32 [N padded] of per-channel 4-bit weights, else None.

    What GEMMs that go on with a norm need between their blocks, one for all weights of a GPU, on which
    such launches therefore may not run side by side:
    inbox: int16 [INBOX_OUTPUTS], all -1 between launches: few tokens' outputs (csrc/tail_small.cuh).
    parts: int32 [2, INBOX_PARTS, 2], of many tokens' rows, turns: int32 [4], all 0 at first; all of
    parts[turns[0]] are -1 between launches (csrc/tail_large.cuh).
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    policy: Policy
    shape: tuple[int, int]
    device: Device
    inbox: Tensor
    parts: Tensor
    turns: Tensor
    _tiles: dict[int, Tile] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def prepare(cls, weight: QuantizedWeight, device: torch.device) -> CudaWeight:
        """Repack the checkpoint's tensors on `device`."""
        rows, columns = weight.shape
        if rows % SLAB_ROWS or columns % SLAB_ROWS or columns > MAX_COLUMNS:
            raise OpError(
                f"prepare_weight: sizes {rows} x {columns} must be multiples of {SLAB_ROWS}, "
                f"the second at most {MAX_COLUMNS}"
            )
        moved = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
        prepared = cls._repack(type(weight)(**moved))
        # Kernels start streaming weights before their predecessors end, so this must have ended.
        torch.cuda.current_stream(device).synchronize()
        return prepared

    @classmethod
    def _repack(cls, weight: QuantizedWeight) -> CudaWeight:
        packed, zero = pack_blocks(weight), None
        if not isinstance(weight, W4Weight):
            scale, policy = weight.dequant_scale.float(), Policy(bits=8)
        elif weight.group_size != -1:
            scale, policy = weight.s1_scales.float(), Policy(group_size=weight.group_size)
        else:
            scale, zero = weight.s1_scales.float(), _pad_rows(weight.zeros())
            policy = Policy(fractional_zeros=bool((zero != zero.round()).any()))
        where = packed.device
        shared = _device(where), _inbox(where), *_parts(where)
        return cls(packed, _pad_rows(scale), zero, policy, weight.shape, *shared)

    def apply(self, x: QuantizedActivation, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """[M, N] in `out_dtype`, float16 or bfloat16."""
        return self.apply_tile(x, bias, out_dtype, self.tile_for(x.codes.shape[0]))

    def tile_for(self, tokens: int) -> Tile:
        """The tile that `apply` takes for so many tokens."""
        tile = self._tiles.get(tokens)
        if tile is None:
            problem = Problem(max(tokens, 1), *self.shape, self.policy.name)
            self._tiles[tokens] = tile = choose(problem, self.device)
        return tile

    def apply_tile(
        self, x: QuantizedActivation, bias: Tensor | None, out_dtype: torch.dtype, tile: Tile
    ) -> Tensor:
        """`apply` with a given tile."""
        bias = self._admit(x, bias, out_dtype)
        out = torch.empty(x.codes.shape[0], self.shape[0], dtype=out_dtype, device=x.codes.device)
        if len(out):
            kernel = gemm_kernel(tile, self.policy, out_dtype == torch.bfloat16, bias is not None)
            launch = _LAUNCHES[tile.kind](tile, self, x.codes, out)
            arguments = (*launch.before, *self._operands(x, bias), *launch.after)
            kernel(out.device, launch.grid, arguments)
        return out

    def apply_with_norm(
        self,
        x: QuantizedActivation,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        tile: Tile,
        norm: Norm,
        norm_fields: tuple[object, ...],
    ) -> None:
        """As `apply_tile`, but a norm takes the outputs; tile: of kind "small" or "large".

        norm_fields: those of `Norm` and `Quantized` of csrc/rows.cuh.
        """
        bias = self._admit(x, bias, out_dtype)
        tokens = x.codes.shape[0]
        kernel = gemm_kernel(tile, self.policy, out_dtype == torch.bfloat16, bias is not None, norm)
        if tile.kind == "small":
            outputs = self.inbox[: tokens * self.shape[0]].view(tokens, self.shape[0])
            launch = _small(tile, self, x.codes, outputs)
            shared: tuple[object, ...] = (self.norm_workers(tokens, tile),)
        else:
            clusters = norm.token_tiles * _row_tiles(tile, self.shape[0])
            grid, whole = _large_grid(tile, self.shape, tokens, clusters)
            launch = _Launch(grid, (_token_map(tile, x.codes),), (whole,))
            shared = (self.parts, self.turns)
        arguments = (*launch.before, *self._operands(x, bias), *launch.after, *norm_fields)
        kernel(x.codes.device, launch.grid, (*arguments, *shared))

    def _admit(
        self, x: QuantizedActivation, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor | None:
        """The bias as the kernels take it; raises OpError on what they do not take."""
        if out_dtype not in (torch.float16, torch.bfloat16):
            raise OpError(f"quantized_linear: on a GPU out_dtype is 16 bits wide, not {out_dtype}")
        if bias is not None and bias.dtype != out_dtype:
            bias = bias.float()
        self._require_at_hand(codes=x.codes, scale=x.scale, row_sum=x.row_sum, bias=bias)
        return bias

    def token_tiles_at_once(self, tile: Tile) -> int:
        """Token tiles of which all blocks together make all outputs; tile: of kind "large"."""
        return self.device.multiprocessors // tile.cluster // _row_tiles(tile, self.shape[0])

    def waves(self, tokens: int, tile: Tile) -> float:
        """Tiles that a block of a "large" GEMM has at most; half a one where the last are split."""
        clusters = self.device.multiprocessors // tile.cluster
        tiles, whole = _large_tiles(tile, self.shape, tokens, clusters)
        return -(-whole // clusters) + (0.5 if whole < tiles else 0)

    def norm_workers(self, tokens: int, tile: Tile) -> int:
        """Blocks that share out a norm's rows. They wait for all others, which must find room beside
        them."""
        blocks, multiprocessors = (
            math.prod(_small_grid(tile, self.shape[0], tokens)),
            self.device.multiprocessors,
        )
        return min(tokens, blocks if blocks <= multiprocessors else multiprocessors // 2)

    def _require_at_hand(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.device != self.packed.device:
                raise OpError(
                    f"quantized_linear: {name} is on {tensor.device}, "
                    f"the weight on {self.packed.device}"
                )
            if not tensor.is_contiguous():
                raise OpError(f"quantized_linear: {name} must be contiguous")

    def _operands(self, x: QuantizedActivation, bias: Tensor | None) -> tuple[object, ...]:
        """The fields of `Operands` in csrc/epilogue.cuh."""
        bias_is_float = bias is not None and bias.dtype == torch.float32
        pointers = (self.packed, self.scale, self.zero, bias, x.scale, x.row_sum)
        sizes = (x.codes.shape[0], *self.shape, -(-self.shape[1] // BLOCK))
        return (*pointers, *sizes, int(bias_is_float))


def pack_blocks(weight: QuantizedWeight) -> Tensor:
    """Codes (and level-2 scales) in the order the kernels stream them, uint8 [N/128, K/128, 2, ...].

    Row n = 128 nb + 64 slab + 16 w + 8 r + g and column k = 128 kb + 64 h + 32 p + 16 j + 4 t + b go
    to block (nb, kb), slab, half h, thread 32 w + 4 g + t, word 2 j + r, byte b: 4-bit codes to its
    nibble p, 8-bit codes to load p of the half.
    """
    codes = _pad_blocks(weight.codes() if isinstance(weight, W4Weight) else weight.weight)
    rows, columns = (size // BLOCK for size in codes.shape)
    steps = codes.view(rows, 2, 4, 2, 8, columns, 2, 2, 2, 4, 4).permute(
        0, 5, 1, 6, 7, 2, 4, 9, 8, 3, 10
    )
    if not isinstance(weight, W4Weight):
        return steps.reshape(rows, columns, 2, -1).view(torch.uint8)
    packed = (steps[:, :, :, :, 0] | steps[:, :, :, :, 1] << 4).reshape(rows, columns, 2, -1)
    if weight.group_size == -1:
        return packed.contiguous()
    return torch.cat([packed, _pack_scales(weight, rows, columns)], dim=-1).contiguous()


def _pack_scales(weight: W4Weight, rows: int, columns: int) -> Tensor:
    """u8 [rows, columns, slab, ...]: scale and 128 + zero of rows g and g + 8, per group."""
    assert weight.s2_scales is not None and weight.s2_zeros is not None
    groups = BLOCK // weight.group_size
    scale = layout.unpack_group_scales(weight.s2_scales).view(torch.uint8)
    offset = layout.unpack_group_scales(weight.s2_zeros).view(torch.uint8) + 128
    _require_bytes(weight.codes(), scale, offset)
    pairs = torch.stack([scale, offset], dim=-1)
    pairs = pad(pairs, (0, 0, 0, columns * groups - pairs.shape[1], 0, rows * BLOCK - len(pairs)))
    pairs = pairs.view(rows, 2, 4, 2, 8, columns, groups, 2)
    return pairs.permute(0, 5, 1, 6, 2, 4, 3, 7).reshape(rows, columns, 2, -1)


def _require_bytes(codes: Tensor, scale: Tensor, offset: Tensor) -> None:
    """The kernels dequantize four codes in one multiply-add, which holds while none exceeds 255."""
    grouped = codes.view(*scale.shape, -1).to(torch.int16)
    if (grouped * scale[:, :, None] + offset[:, :, None]).max() > 255:
        raise OpError("prepare_weight: level-2 scales and zeros take a weight beyond 8 bits")


def _pad_blocks(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    return pad(codes, (0, -columns % BLOCK, 0, -rows % BLOCK))


def _pad_rows(values: Tensor) -> Tensor:
    return pad(values, (0, -len(values) % BLOCK)).contiguous()


@dataclass(frozen=True)
class _Launch:
    """The grid, and a kernel's arguments before and after its `Operands`."""

    grid: tuple[int, ...]
    before: tuple[object, ...]
    after: tuple[object, ...]


def _large(tile: Tile, weight: CudaWeight, codes: Tensor, out: Tensor) -> _Launch:
    clusters = weight.device.multiprocessors // tile.cluster
    grid, whole = _large_grid(tile, weight.shape, len(out), clusters)
    return _Launch(grid, (_token_map(tile, codes), tensor_map(out, (64, SLAB_ROWS))), (whole,))


def _large_grid(
    tile: Tile, shape: tuple[int, int], tokens: int, clusters: int
) -> tuple[tuple[int], int]:
    """The grid, and how many tiles run whole, if there are at most so many clusters."""
    tiles, whole = _large_tiles(tile, shape, tokens, clusters)
    used = min(clusters, tiles if whole == tiles else max(whole, 2 * (tiles - whole)))
    return (used * tile.cluster,), whole


def _row_tiles(tile: Tile, rows: int) -> int:
    """Of a cluster each."""
    return -(-rows // (tile.rows * tile.cluster))


def _token_map(tile: Tile, codes: Tensor) -> object:
    return tensor_map(_with_room(codes, tile), (tile.tokens // tile.cluster, BLOCK))


def _large_tiles(tile: Tile, shape: tuple[int, int], tokens: int, clusters: int) -> tuple[int, int]:
    """All tiles, and those that run whole; a last wave that is at most half full is split along K."""
    tiles = -(-tokens // tile.tokens) * _row_tiles(tile, shape[0])
    left = tiles % clusters
    splits = tile.cluster == 2 and 2 * left <= clusters and shape[1] > 2 * BLOCK
    return tiles, tiles - left if splits else tiles


def _small_grid(tile: Tile, rows: int, tokens: int) -> tuple[int, int]:
    return -(-rows // tile.rows) * tile.cluster, -(-tokens // tile.tokens)


def _small(tile: Tile, weight: CudaWeight, codes: Tensor, out: Tensor) -> _Launch:
    grid = _small_grid(tile, weight.shape[0], len(out))
    return _Launch(grid, (tensor_map(_with_room(codes, tile), (tile.tokens, BLOCK)),), (out,))


def _with_room(codes: Tensor, tile: Tile) -> Tensor:
    """The codes, and what lies behind them up to a whole tile, as far as their storage goes.

    What is made of it is never stored. But where a matrix ends the copy engine fills in zeros, which
    takes it longer than to read: 257 tokens took up to two thirds longer than 384 (docs/kernels.md).
    """
    rows, columns = codes.shape
    if tile.tokens < TOKENS_WORTH_ROOM or rows % tile.tokens == 0:
        return codes
    behind = codes.untyped_storage().nbytes() - codes.storage_offset() - codes.numel()
    rows += min(-rows % tile.tokens, behind // columns)
    return codes.as_strided((rows, columns), (columns, 1))


def _portable(tile: Tile, weight: CudaWeight, codes: Tensor, out: Tensor) -> _Launch:
    grid = (-(-len(out) // tile.tokens), -(-weight.shape[0] // tile.rows))
    return _Launch(grid, (codes,), (out,))


_LAUNCHES = {"large": _large, "small": _small, "portable": _portable}


@cache
def _inbox(device: torch.device) -> Tensor:
    return torch.full((INBOX_OUTPUTS,), -1, dtype=torch.int16, device=device)


@cache
def _parts(device: torch.device) -> tuple[Tensor, Tensor]:
    parts = torch.full((2, INBOX_PARTS, 2), -1, dtype=torch.int32, device=device)
    return parts, torch.zeros(4, dtype=torch.int32, device=device)


@cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    arch = device_arch(device.index)
    return Device(properties.name, arch, properties.multi_processor_count)
