"""The memory of the cache: how many pages fit, and the pools that hold them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qserve.config import ConfigError, EngineConfig
from qserve.engine.device import StepLimits
from qserve.formats.kv import KVFormat
from qserve.models.decoder import Decoder


@dataclass(frozen=True)
class CacheShape:
    """A cache: its format, pages, and whether keys are rotated before they are stored.

    One page more than `num_pages` exists: rows that pad a step write there.
    """

    kv_format: KVFormat
    num_pages: int
    hadamard: bool = False


def kv_format_of(decoder: Decoder, bits: int) -> KVFormat:
    """The format of a decoder's cache; unquantized pages hold bfloat16 if the model computes in
    it."""
    model = decoder.config
    dtype = torch.bfloat16 if decoder.dtype == torch.bfloat16 else torch.float16
    return KVFormat(bits, model.head_dim, model.num_kv_heads, dtype)


def choose_num_pages(
    config: EngineConfig,
    limits: StepLimits,
    page_bytes: int,
    reserved: int,
    device: torch.device,
) -> int:
    """Pages that the limits can use, or that fit the share of free memory, whichever is less.

    page_bytes: of one page in all layers. reserved: bytes of that share that steps need themselves.
    Raises ConfigError if not one page fits.
    """
    useful = limits.max_num_sequences * limits.max_pages
    available = int(free_bytes(device) * config.gpu_memory_utilization) - reserved
    num_pages = min(useful, available // page_bytes)
    if num_pages < 1:
        raise ConfigError(
            f"a page of the cache takes {page_bytes} bytes, but of the free memory's share only "
            f"{max(available, 0)} are left beside the {reserved} that a step needs: lower "
            "max_batched_tokens or max_num_sequences, or raise gpu_memory_utilization"
        )
    return num_pages


def allocate_pools(
    kv_format: KVFormat, num_layers: int, num_pages: int, device: torch.device
) -> Tensor:
    """uint8 [L, pages, Hkv, block_bytes], not initialised: no byte is read before it is written.

    Raises ConfigError if they do not fit.
    """
    needed, free = num_layers * num_pages * kv_format.page_bytes, free_bytes(device)
    if needed > free:
        raise ConfigError(f"num_pages {num_pages} take {needed} bytes, but only {free} are free")
    shape = (num_layers, num_pages, kv_format.num_kv_heads, kv_format.block_bytes)
    return torch.empty(shape, dtype=torch.uint8, device=device)


def free_bytes(device: torch.device) -> int:
    """Memory of the device, or of the host for the CPU, that can still be taken."""
    if device.type != "cpu":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
