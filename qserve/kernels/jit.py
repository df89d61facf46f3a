"""Compile, cache and launch the CUDA kernels of `csrc/`.

A kernel variant is declared once, at module level or in a cached factory, and called with a grid:

    scale_rows = Kernel("scale.cu", "scale_rows", parameters="2Pi", threads=128,
                        constants={"COLUMNS": 4096})
    scale_rows(device, grid=(rows,), arguments=(x, y, rows))

`parameters` has one letter of `struct` per C parameter: P pointer (a tensor or None), i int, q long
long, f float, 128s a `TensorMap` (see `tensor_map.py`); in parentheses, a struct passed by value, whose
fields follow each other in `arguments`. `constants` become `constexpr int` lines before the source,
after the numbers of `formats.layout`; `#include "x.cuh"` is resolved inside `csrc/`. NVRTC compiles
at the first launch (or in `warm_up`), and the cubin is kept on disk under a hash of everything that
went into it. Launches go to torch's current stream and may be captured in CUDA graphs. Nothing of
CUDA is imported here before a kernel is compiled or launched.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from qserve.formats.layout import cuda_prelude

CSRC = Path(__file__).parent / "csrc"
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
_PARAMETER = re.compile(r"\((.+?)\)|(\d*)([a-zA-Z])")
_FLAGS = ("c++17", "-v")
_UNUSED_CONSTANT = 177


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched; the message says why."""


@dataclass(frozen=True)
class Build:
    """A compiled variant: the cubin's bytes and what the assembler said of its resources."""

    cubin: bytes
    log: str


@dataclass(eq=False)
class Kernel:
    """One variant of one kernel: its source, compile-time constants and launch shape.

    shared_bytes: dynamic shared memory of a block. cluster: blocks in a cluster along x.
    overlap: launch with programmatic stream serialization, so that from sm_90 on the kernel may start
    before its predecessor ends; it must execute `griddepcontrol.wait` before touching what that wrote.
    generated: further CUDA source, placed before the file's.
    """

    source: str
    entry: str
    parameters: str
    threads: int
    shared_bytes: int = 0
    cluster: int = 1
    overlap: bool = False
    constants: Mapping[str, int] = field(default_factory=dict)
    generated: str = ""
    _loaded: dict[int, _Loaded] = field(default_factory=dict, repr=False)

    @cached_property
    def text(self) -> str:
        """The whole translation unit."""
        constants = "".join(f"constexpr int {k} = {int(v)};\n" for k, v in self.constants.items())
        return cuda_prelude() + constants + self.generated + _inline(self.source, set())

    def parameter_formats(self) -> list[str]:
        """The `struct` format of each C parameter."""
        formats: list[str] = []
        for by_value, count, letter in _PARAMETER.findall(self.parameters):
            if by_value or letter == "s":
                formats.append(by_value or count + letter)
            else:
                formats += [letter] * int(count or 1)
        return formats

    def __str__(self) -> str:
        constants = " ".join(f"{name}={int(value)}" for name, value in self.constants.items())
        return f"{self.entry} {constants}".strip()

    def __call__(
        self, device: torch.device, grid: tuple[int, ...], arguments: Sequence[Any]
    ) -> None:
        """Launch `grid` blocks (x, y, z) on the current stream of `device`."""
        if _listing is not None:
            _listing[self] = None
            return
        index = torch.cuda.current_device() if device.index is None else device.index
        loaded = self._loaded.get(index) or self.load(index)
        loaded.launch(torch._C._cuda_getCurrentRawStream(index), grid, arguments)

    def load(self, device_index: int) -> _Loaded:
        """Compile if need be and load onto a device; later launches there are cheap."""
        loaded = _Loaded(self, device_index)
        self._loaded[device_index] = loaded
        return loaded


_listing: dict[Kernel, None] | None = None


@contextmanager
def listing() -> Iterator[dict[Kernel, None]]:
    """Note which variants are called instead of launching them; what they were to write is undefined."""
    global _listing
    _listing, before = {}, _listing
    try:
        yield _listing
    finally:
        _listing = before


class _Loaded:
    """A variant on one device."""

    def __init__(self, kernel: Kernel, device_index: int) -> None:
        core = _core()
        self._kernel = kernel
        formats = [format + "0q" for format in kernel.parameter_formats()]  # 0q: 8-byte aligned
        self._layout = struct.Struct("".join(formats))
        self._parameters = ctypes.create_string_buffer(max(1, self._layout.size))
        start = ctypes.addressof(self._parameters)
        offsets = [struct.calcsize("".join(formats[:i])) for i in range(len(formats))]
        self._table = (ctypes.c_void_p * len(formats))(*[start + offset for offset in offsets])
        self._table_address = ctypes.addressof(self._table)
        self._launching = Lock()
        arch = device_arch(device_index)
        self._may_overlap = int(arch[3:].rstrip("a")) >= 90
        cubin = build(kernel, arch).cubin
        self._code = core.ObjectCode.from_cubin(cubin)
        handle = self._code.get_kernel(kernel.entry).handle
        self._function = driver().CUfunction(int(handle))
        attribute = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(
            driver().cuKernelSetAttribute(attribute, kernel.shared_bytes, handle, device_index),
            kernel,
        )
        self._config = lru_cache(maxsize=1024)(self._make_config)

    def launch(self, stream: int, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """The driver copies the parameters before it returns, so one buffer serves every launch."""
        values = [
            argument.data_ptr() if isinstance(argument, Tensor) else argument or 0
            for argument in arguments
        ]
        config = self._config(stream, grid)
        with self._launching:
            self._layout.pack_into(self._parameters, 0, *values)
            status = driver().cuLaunchKernelEx(config, self._function, self._table_address, 0)
        if status[0]:
            _check(status, self._kernel)

    def _make_config(self, stream: int, grid: tuple[int, ...]) -> Any:
        kernel = self._kernel
        config = driver().CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes = kernel.shared_bytes
        config.hStream = stream
        config.attrs = _attributes(kernel.cluster, kernel.overlap and self._may_overlap)
        config.numAttrs = len(config.attrs)
        return config


def _attributes(cluster_size: int, may_overlap: bool) -> list[Any]:
    names = driver().CUlaunchAttributeID
    attributes = []
    if cluster_size > 1:
        cluster = driver().CUlaunchAttribute()
        cluster.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = cluster.value.clusterDim
        size.x, size.y, size.z = cluster_size, 1, 1
        attributes.append(cluster)
    if may_overlap:
        overlap = driver().CUlaunchAttribute()
        overlap.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        attributes.append(overlap)
    return attributes


def warm_up(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compile (in parallel) and load variants before the first request needs them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    build_all(kernels := list(kernels), device_arch(index))
    for kernel in kernels:
        if index not in kernel._loaded:
            kernel.load(index)


def build_all(kernels: Iterable[Kernel], arch: str) -> list[Build]:
    """Compile variants in parallel; the compiler runs outside Python's lock."""
    _compiler_version()  # imports what the threads need, once
    kernels = list(kernels)
    distinct = {kernel.text: kernel for kernel in kernels}  # several entries may share a source
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = pool.map(lambda kernel: build(kernel, arch), distinct.values())
        by_text = dict(zip(distinct, builds, strict=True))
    return [by_text[kernel.text] for kernel in kernels]


def build(kernel: Kernel, arch: str) -> Build:
    """The compiled variant for an architecture such as "sm_90a", from the cache or NVRTC.

    Needs no GPU. Raises KernelError with the compiler's message.
    """
    key = hashlib.sha256(repr((kernel.text, arch, _FLAGS, _compiler_version())).encode())
    stem = cache_directory() / key.hexdigest()
    cubin, log = stem.with_suffix(".cubin"), stem.with_suffix(".log")
    if cubin.exists() and log.exists():
        return Build(cubin.read_bytes(), log.read_text())
    built = _compile(kernel, arch)
    _write_atomically(log, built.log.encode())
    _write_atomically(cubin, built.cubin)
    return built


def cache_directory() -> Path:
    """Where cubins are kept: `qserve/kernels` under the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qserve" / "kernels"


@cache
def device_arch(device_index: int) -> str:
    """The architecture to compile for; raises KernelError for one older than sm_80."""
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8:
        raise KernelError(
            f"device {device_index} has compute capability {major}.{minor}; 8.0 is the oldest served"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _compile(kernel: Kernel, arch: str) -> Build:
    core = _core()
    standard, verbose = _FLAGS
    options = core.ProgramOptions(
        name=kernel.source,
        arch=arch,
        std=standard,
        ptxas_options=[verbose],
        include_path=_header_directory(),
        diag_suppress=[_UNUSED_CONSTANT],
    )
    log = io.StringIO()
    try:
        code = core.Program(kernel.text, "c++", options).compile("cubin", logs=log)
    except Exception as error:
        raise KernelError(f"{kernel} for {arch}: {error}") from error
    return Build(bytes(code.code), log.getvalue().rstrip("\0"))


def _inline(name: str, seen: set[str]) -> str:
    """The text of a file of csrc/ with its quoted includes in place, each once."""
    seen.add(name)
    text = (CSRC / name).read_text()

    def replace(match: re.Match[str]) -> str:
        included = "" if match[1] in seen else _inline(match[1], seen)
        return f'{included}\n#line {text.count(chr(10), 0, match.end()) + 2} "{name}"'

    return f'#line 1 "{name}"\n' + _INCLUDE.sub(replace, text)


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


@cache
def _core() -> Any:
    try:
        import cuda.core
    except ImportError as error:
        raise KernelError(f"CUDA kernels need pip install 'qserve[gpu]': {error}") from error
    return cuda.core


@cache
def driver() -> Any:
    """The CUDA driver's bindings."""
    _core()
    from cuda.bindings import driver as bindings

    return bindings


@cache
def _compiler_version() -> tuple[int, int]:
    _core()
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:
        raise KernelError(f"NVRTC is missing; pip install 'qserve[gpu]': {error}") from error
    return major, minor


@cache
def _header_directory() -> list[str]:
    """Where `<cuda_fp16.h>` and its like lie."""
    from cuda.pathfinder import find_nvidia_header_directory

    directory = find_nvidia_header_directory("cudart")
    return [] if directory is None else [directory]


def _check(status: tuple[Any, ...], kernel: Kernel) -> None:
    if int(status[0]) != 0:
        raise KernelError(f"{kernel}: {status[0].name}")
