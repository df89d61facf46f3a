"""The KV cache page: 64 tokens of one KV head, contiguous, 4, 8 or 16 bits per element.

A block holds K codes | V codes | K (scale, offset) per token | V (scale, offset) per token; a 16-bit
block holds the values alone. Per (token, head): `x ~ scale * code + offset`, both float16, so that a
constant row is exact and never divides by zero. K is stored after RoPE.

The order of 4-bit and 8-bit codes is the one in which the decode kernel's tensor-core fragments want
them: each lane reads 16-byte words, and every byte belongs to one token, so appending needs no
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

    @property
    def key_channel_order(self) -> Tensor:
        """int64 [D]: which channel each unpacked K element is (`unpack_codes`)."""
        return _code_layout(self.bits, self.head_dim).key_channels

    @property
    def value_channel_order(self) -> Tensor:
        """int64 [D]: which channel each unpacked V element is (`unpack_codes`)."""
        return _code_layout(self.bits, self.head_dim).value_channels

    @property
    def key_channel_places(self) -> Tensor:
        """int64 [D]: where each channel lies in an unpacked K row."""
        return _code_layout(self.bits, self.head_dim).key_places

    @property
    def value_channel_places(self) -> Tensor:
        """int64 [D]: where each channel lies in an unpacked V row."""
        return _code_layout(self.bits, self.head_dim).value_places

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
    scales = 2 * kv_format.code_bytes
    key_row = _TokenRow.of(keys, kv_format.bits, code_layout.key_channels)
    _scatter(pool, pages, code_layout.key_bytes[offsets], key_row.codes)
    _scatter(pool, pages, scales + _scale_bytes_of(offsets), key_row.scales)
    value_row = _TokenRow.of(values, kv_format.bits, code_layout.value_channels)
    _scatter(pool, pages, kv_format.code_bytes + code_layout.value_bytes[offsets], value_row.codes)
    scales += kv_format.scale_bytes
    _scatter(pool, pages, scales + _scale_bytes_of(offsets), value_row.scales)


@dataclass(frozen=True)
class _TokenRow:
    """What one token of one head writes: codes u8 [T, Hkv, bytes], scales u8 [T, Hkv, 4]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, x: Tensor, bits: int, channels: Tensor) -> _TokenRow:
        quantized = quantize_kv(x, bits)
        codes = quantized.codes[..., channels]
        if bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low | (high << 4)
        pairs = torch.stack((quantized.scale, quantized.offset), dim=-1)
        return cls(codes, pairs.view(torch.uint8))


def _scatter(pool: Tensor, pages: Tensor, where: Tensor, row: Tensor) -> None:
    """Write row u8 [T, Hkv, n] at bytes where i64 [T, n] of the tokens' blocks."""
    heads = torch.arange(pool.shape[1])[None, :, None]
    pool[pages[:, None, None], heads, where[:, None, :]] = row


def _scale_bytes_of(offsets: Tensor) -> Tensor:
    return offsets[:, None] * KV_SCALE_BYTES + torch.arange(KV_SCALE_BYTES)


def unpack_codes(blocks: Tensor, kv_format: KVFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V codes of blocks u8 [..., block_bytes] as `dtype` [..., 64, D].

    Channels come in `kv_format.key_channel_order` and `value_channel_order`.
    """
    keys, values = blocks[..., : 2 * kv_format.code_bytes].unflatten(-1, (2, -1)).unbind(-2)
    if kv_format.bits == 16:
        shape = (PAGE_TOKENS, kv_format.head_dim)
        keys, values = (half.contiguous().view(kv_format.dtype) for half in (keys, values))
        return keys.to(dtype).unflatten(-1, shape), values.to(dtype).unflatten(-1, shape)
    bits, word = kv_format.bits, _WORD[kv_format.bits]
    words = _key_words_by_token(keys.contiguous().view(word), bits).view(torch.uint8)
    pairs = _value_pairs_by_token(values.contiguous().view(torch.int16), bits).view(torch.uint8)
    if bits == 8:
        return words.to(dtype), pairs.to(dtype)
    return _nibbles(words, dtype), _nibbles(pairs, dtype)


def _nibbles(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """u8 [..., n] to `dtype` [..., 2n]: all low nibbles, then all high ones."""
    return torch.cat((packed & 0xF, packed >> 4), dim=-1).to(dtype)


def unpack_scales(blocks: Tensor, kv_format: KVFormat) -> tuple[Tensor, Tensor]:
    """K's and V's float16 [..., 64, 2] (scale, offset) of blocks u8 [..., block_bytes]."""
    scales = blocks[..., 2 * kv_format.code_bytes :].contiguous().view(torch.float16)
    keys, values = scales.unflatten(-1, (2, PAGE_TOKENS, 2)).unbind(-3)
    return keys, values


def dequantize_blocks(blocks: Tensor, kv_format: KVFormat) -> tuple[Tensor, Tensor]:
    """K and V float64 [..., 64, D] of blocks u8 [..., block_bytes], channels in natural order."""
    keys, values = unpack_codes(blocks, kv_format, torch.float64)
    keys = keys[..., kv_format.key_channel_places]
    values = values[..., kv_format.value_channel_places]
    if kv_format.bits == 16:
        return keys, values
    key_scales, value_scales = unpack_scales(blocks, kv_format)
    return _affine(keys, key_scales), _affine(values, value_scales)


def _affine(codes: Tensor, scales: Tensor) -> Tensor:
    scale, offset = scales.double().unbind(-1)
    return codes * scale[..., None] + offset[..., None]


@dataclass(frozen=True)
class _CodeLayout:
    """Byte of each token's codes within its half, i64 [64, bytes], and the channels they hold: of
    4-bit codes those of the low nibbles, then those of the high ones."""

    key_bytes: Tensor
    key_channels: Tensor
    value_bytes: Tensor
    value_channels: Tensor

    @cached_property
    def key_places(self) -> Tensor:
        """i64 [D], the inverse of key_channels."""
        return self.key_channels.argsort()

    @cached_property
    def value_places(self) -> Tensor:
        """i64 [D], the inverse of value_channels."""
        return self.value_channels.argsort()


@lru_cache(maxsize=8)
def _code_layout(bits: int, head_dim: int) -> _CodeLayout:
    channels = torch.arange(head_dim)
    if bits == 16:
        natural = torch.arange(PAGE_TOKENS * head_dim * 2).reshape(PAGE_TOKENS, -1)
        return _CodeLayout(natural, channels, natural, channels)
    words = _key_words_by_token(torch.arange(PAGE_TOKENS * head_dim // 8), bits)
    pairs = _value_pairs_by_token(torch.arange(PAGE_TOKENS * head_dim * bits // 16), bits)
    eights = channels.reshape(-1, 8)
    low_and_high = torch.cat((eights[:, [0, 4, 1, 5]], eights[:, [2, 6, 3, 7]])).flatten()
    return _CodeLayout(
        key_bytes=(words[..., None] * bits + torch.arange(bits)).flatten(1),
        key_channels=low_and_high if bits == 4 else eights[:, [0, 2, 1, 3, 4, 6, 5, 7]].flatten(),
        value_bytes=(pairs[..., None] * 2 + torch.arange(2)).flatten(1),
        value_channels=torch.cat((channels[0::2], channels[1::2])) if bits == 4 else channels,
    )


_WORD = {4: torch.int32, 8: torch.int64}
"""The integer that holds 8 neighbouring channels of one token's K."""


def _key_words_by_token(words: Tensor, bits: int) -> Tensor:
    """The K half's words of 8 codes [..., 8 D] in memory order, as [..., token, D / 8].

    A word holds 8 neighbouring channels of one token. token = 8 g + 2 i1 + i0,
    word = t * D / 32 + p, p = 2 p1 + p0 for 4 bits and p1 for 8.
    """
    memory = words.unflatten(-1, (4, -1, 8, 4, 8 // bits, 2))  # i1, p1, g, t, p0, i0
    return _reorder(memory, (2, 0, 5, 3, 1, 4))


def _value_pairs_by_token(pairs: Tensor, bits: int) -> Tensor:
    """The V half's pairs of bytes [...] in memory order, as [..., token, D * bits / 16].

    A pair holds neighbouring channels of one token: 4 of 4 bits, or 2 of 8 (then two pairs, s = 0
    and 1, make 4 channels). token = 16 g1 + 8 g0 + 2 i1 + i0, 4 channels = 8 q + p, q = 2 q1 + q0
    for 4 bits and q1 for 8.
    """
    shape = (4, -1, 8, 4, 8 // bits, 2, bits // 4, 2)  # i1, q1, p, g1, q0, i0, s, g0
    return _reorder(pairs.unflatten(-1, shape), (3, 7, 0, 5, 1, 4, 2, 6))


def _reorder(memory: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute the trailing dimensions and fold them to [..., 64, n]."""
    leading = memory.dim() - len(order)
    natural = memory.permute(*range(leading), *(leading + dim for dim in order))
    return natural.reshape(*memory.shape[:leading], PAGE_TOKENS, -1)
