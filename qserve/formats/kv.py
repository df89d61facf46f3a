"""The KV cache page: 64 tokens of one KV head, contiguous, 4, 8 or 16 bits per element.

A block holds K codes | V codes | K (scale, offset) per token | V (scale, offset) per token; a 16-bit
block holds the values alone. Per (token, head): `x ~ scale * code + offset`, both float16, so that a
constant row is exact and never divides by zero. K is stored after RoPE.

The order of the 4-bit codes is the one in which the decode kernel's tensor-core fragments want them:
each lane reads 16-byte words, and every byte belongs to one token, so appending needs no
read-modify-write.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from qserve.formats.layout import KV_SCALE_BYTES, PAGE_TOKENS
from qserve.formats.weight import FormatError


@dataclass(frozen=True)
class KVFormat:
    """One layer's cache format. `dtype` is what 16-bit pages hold: float16 or bfloat16."""

    bits: int
    head_dim: int
    num_kv_heads: int
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise FormatError(f"KV bits must be 4, 8 or 16, not {self.bits}")
        if self.head_dim not in (64, 128):
            raise FormatError(f"head dim must be 64 or 128, not {self.head_dim}")
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise FormatError(f"16-bit pages hold float16 or bfloat16, not {self.dtype}")

    @property
    def code_bytes(self) -> int:
        """Bytes of one block's K codes (and of its V codes)."""
        return PAGE_TOKENS * self.head_dim * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of one block's K scales and offsets (and of its V's)."""
        return 0 if self.bits == 16 else PAGE_TOKENS * KV_SCALE_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of one page of one KV head."""
        return 2 * (self.code_bytes + self.scale_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        return self.num_kv_heads * self.block_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in one layer."""
        return self.page_bytes // PAGE_TOKENS

    @cached_property
    def key_channel_order(self) -> Tensor:
        """int64 [D]: which channel each unpacked K element is (`unpack_codes`)."""
        return _code_layout(self.bits, self.head_dim).key_channels

    def new_pool(self, num_pages: int, device: torch.device | str = "cpu") -> Tensor:
        """uint8 [num_pages, Hkv, block_bytes], not initialised."""
        shape = (num_pages, self.num_kv_heads, self.block_bytes)
        return torch.empty(shape, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class QuantizedKV:
    """codes u8 [..., D], scale and offset float16 [...]: `x ~ scale * code + offset`."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """float32 [..., D]."""
        return self.codes.float() * self.scale.float()[..., None] + self.offset.float()[..., None]


def quantize_kv(x: Tensor, bits: int) -> QuantizedKV:
    """Quantize x [..., D] per row to unsigned codes of 4 or 8 bits.

    In float32: offset = f16(min), scale = f16((max - min) / (2^bits - 1)),
    code = round_half_to_even((x - offset) * (1 / scale)); a scale of 0 gives codes of 0.
    """
    values = x.to(torch.float32)
    top = 2**bits - 1
    low, high = values.amin(dim=-1), values.amax(dim=-1)
    limit = torch.finfo(torch.float16).max
    offset = low.clamp(-limit, limit).half()
    scale = ((high - low) / top).clamp(max=limit).half()
    step = scale.float()
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    steps = torch.round((values - offset.float()[..., None]) * inverse[..., None])
    return QuantizedKV(steps.clamp_(0, top).to(torch.uint8), scale, offset)


def write_tokens(
    pool: Tensor, kv_format: KVFormat, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Quantize keys and values [T, Hkv, D] and write them at slots i64 [T] (page * 64 + offset)."""
    pages, offsets = slots // PAGE_TOKENS, slots % PAGE_TOKENS
    if kv_format.bits == 16:
        halves = pool.view(kv_format.dtype).unflatten(-1, (2, PAGE_TOKENS, kv_format.head_dim))
        halves[pages, :, 0, offsets] = keys.to(kv_format.dtype)
        halves[pages, :, 1, offsets] = values.to(kv_format.dtype)
        return
    code_layout = _code_layout(kv_format.bits, kv_format.head_dim)
    _write_half(
        pool, kv_format, pages, offsets, keys, 0, code_layout.key_bytes, code_layout.key_channels
    )
    _write_half(
        pool,
        kv_format,
        pages,
        offsets,
        values,
        1,
        code_layout.value_bytes,
        code_layout.value_channels,
    )


def _write_half(
    pool: Tensor,
    kv_format: KVFormat,
    pages: Tensor,
    offsets: Tensor,
    x: Tensor,
    half: int,
    byte_index: Tensor,
    channels: Tensor,
) -> None:
    quantized = quantize_kv(x, kv_format.bits)
    codes = quantized.codes[..., channels]
    if kv_format.bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    heads = torch.arange(kv_format.num_kv_heads)[None, :, None]
    where = half * kv_format.code_bytes + byte_index[offsets][:, None, :]
    pool[pages[:, None, None], heads, where] = codes
    first_scale = 2 * kv_format.code_bytes + half * kv_format.scale_bytes
    scales = pool[..., first_scale : first_scale + kv_format.scale_bytes].view(torch.float16)
    pairs = torch.stack((quantized.scale, quantized.offset), dim=-1)
    columns = offsets[:, None] * 2 + torch.arange(2)
    scales[pages[:, None, None], heads, columns[:, None, :]] = pairs


def unpack_codes(blocks: Tensor, kv_format: KVFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V codes of blocks u8 [..., block_bytes] as `dtype` [..., 64, D].

    K's channels come in `kv_format.key_channel_order`, V's in natural order.
    """
    keys, values = blocks[..., : 2 * kv_format.code_bytes].unflatten(-1, (2, -1)).unbind(-2)
    if kv_format.bits == 16:
        shape = (PAGE_TOKENS, kv_format.head_dim)
        return tuple(
            half.contiguous().view(kv_format.dtype).to(dtype).unflatten(-1, shape)
            for half in (keys, values)
        )
    code_layout = _code_layout(kv_format.bits, kv_format.head_dim)
    keys, values = keys[..., code_layout.key_bytes], values[..., code_layout.value_bytes]
    if kv_format.bits == 8:
        return keys.to(dtype), values.to(dtype)
    pairs = _nibble_pairs(dtype)
    return pairs[keys.int()].flatten(-2), pairs[values.int()].flatten(-2)


def unpack_scales(blocks: Tensor, kv_format: KVFormat) -> tuple[Tensor, Tensor]:
    """K's and V's float16 [..., 64, 2] (scale, offset) of blocks u8 [..., block_bytes]."""
    scales = blocks[..., 2 * kv_format.code_bytes :].contiguous().view(torch.float16)
    keys, values = scales.unflatten(-1, (2, PAGE_TOKENS, 2)).unbind(-3)
    return keys, values


def dequantize_blocks(blocks: Tensor, kv_format: KVFormat) -> tuple[Tensor, Tensor]:
    """K and V float64 [..., 64, D] of blocks u8 [..., block_bytes], channels in natural order."""
    keys, values = unpack_codes(blocks, kv_format, torch.float64)
    keys = keys[..., torch.argsort(kv_format.key_channel_order)]
    if kv_format.bits == 16:
        return keys, values
    key_scales, value_scales = unpack_scales(blocks, kv_format)
    return _affine(keys, key_scales), _affine(values, value_scales)


def _affine(codes: Tensor, scales: Tensor) -> Tensor:
    scale, offset = scales.double().unbind(-1)
    return codes * scale[..., None] + offset[..., None]


@dataclass(frozen=True)
class _CodeLayout:
    """Byte of each token's codes within its half, i64 [64, bytes], and the channels they hold."""

    key_bytes: Tensor
    key_channels: Tensor
    value_bytes: Tensor
    value_channels: Tensor


@lru_cache(maxsize=8)
def _code_layout(bits: int, head_dim: int) -> _CodeLayout:
    if bits != 4:
        natural = torch.arange(PAGE_TOKENS * head_dim).reshape(PAGE_TOKENS, head_dim)
        channels = torch.arange(head_dim)
        return _CodeLayout(natural, channels, natural, channels)
    nibbles = torch.arange(PAGE_TOKENS * head_dim)
    return _CodeLayout(
        *_bytes_and_channels(_natural_keys(nibbles, head_dim)),
        *_bytes_and_channels(_natural_values(nibbles, head_dim)),
    )


def _natural_keys(nibbles: Tensor, head_dim: int) -> Tensor:
    """Nibbles of the K half, in memory order, as [token, channel].

    token = 8 g + 2 i1 + i0, channel = t * D/4 + 16 p1 + 8 p0 + 4 j2 + 2 j1 + j0.
    """
    memory = nibbles.reshape(4, head_dim // 64, 8, 4, 2, 2, 2, 2, 2)
    # memory order: i1, p1, g, t, p0, i0, j0, j2, j1
    natural = memory.permute(2, 0, 5, 3, 1, 4, 7, 8, 6)
    return natural.reshape(PAGE_TOKENS, head_dim)


def _natural_values(nibbles: Tensor, head_dim: int) -> Tensor:
    """Nibbles of the V half, in memory order, as [token, channel].

    token = 16 g1 + 8 g0 + 2 i1 + i0, channel = 64 q1 + 32 q0 + 4 p + 2 sub + hi.
    """
    memory = nibbles.reshape(4, head_dim // 64, 8, 4, 2, 2, 2, 2, 2)
    # memory order: i1, q1, p, g1, q0, i0, g0, sub, hi
    natural = memory.permute(3, 6, 0, 5, 1, 4, 2, 7, 8)
    return natural.reshape(PAGE_TOKENS, head_dim)


def _bytes_and_channels(addresses: Tensor) -> tuple[Tensor, Tensor]:
    """Per token: its bytes, and the channels of their low and high nibbles, bytes by lowest channel."""
    ordered, channels = addresses.sort(dim=1)
    pairs = channels[0].unflatten(0, (-1, 2))
    by_channel = pairs[:, 0].argsort()
    return ordered[:, ::2][:, by_channel] // 2, pairs[by_channel].flatten()


@lru_cache(maxsize=4)
def _nibble_pairs(dtype: torch.dtype) -> Tensor:
    """[256, 2]: the low and the high nibble of every byte."""
    byte = torch.arange(256)
    return torch.stack((byte & 0xF, byte >> 4), dim=-1).to(dtype)
