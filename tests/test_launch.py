"""What a launch hands to the driver, seen by a driver that only remembers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.core")

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.weight import W8Weight
from qserve.kernels import OpError, gemm_cuda, jit, tensor_map
from qserve.kernels.gemm_cuda import CudaWeight, pack_blocks
from qserve.kernels.gemm_norm_cuda import (
    fuses,
    has_room,
    linear_rms_norm_quantize,
    tile_for,
)
from qserve.kernels.gemm_variants import Policy
from qserve.kernels.jit import Kernel, KernelError
from qserve.kernels.producers_cuda import silu_mul_quantize
from qserve.kernels.tiles import Device, Tile

PARAMETERS = b"\x07" * 128


class Driver:
    """cuda.bindings.driver, but launches are kept instead of made."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._bindings = driver
        self.launches: list[tuple[Any, int]] = []
        self.status = driver.CUresult.CUDA_SUCCESS

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def cuKernelSetAttribute(self, *_: object) -> tuple[Any]:  # noqa: N802
        return (self.status,)

    def cuLaunchKernelEx(self, config: Any, function: Any, table: int, extra: int) -> tuple[Any]:  # noqa: N802
        self.launches.append((config, table))
        self.parameters = [
            ctypes.string_at(pointer, struct.calcsize(format))
            for pointer, format in zip(
                (ctypes.c_void_p * len(self.formats)).from_address(table), self.formats, strict=True
            )
        ]
        return (self.status,)

    formats: list[str]
    parameters: list[bytes]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    code = SimpleNamespace(get_kernel=lambda _: SimpleNamespace(handle=1))
    core = SimpleNamespace(ObjectCode=SimpleNamespace(from_cubin=lambda _: code))
    monkeypatch.setattr(jit, "driver", lambda: fake)
    monkeypatch.setattr(jit, "_core", lambda: core)
    monkeypatch.setattr(jit, "device_arch", lambda _: "sm_90a")
    monkeypatch.setattr(jit, "build", lambda *_: jit.Build(b"", ""))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 99, raising=False)
    return fake


def launch(
    driver: Driver, kernel: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...]
) -> Any:
    driver.formats = kernel.parameter_formats()
    kernel(torch.device("cuda:0"), grid, arguments)
    return driver.launches[-1][0]


def test_parameters_arrive_one_by_one(driver: Driver) -> None:
    kernel = Kernel("k.cu", "k", "128s(2Pi)Pfi", 64)
    tensor = torch.zeros(4)
    launch(driver, kernel, (3,), (PARAMETERS, tensor, None, 5, 12345, 1.5, -2))
    address = tensor.data_ptr()
    assert driver.parameters == [
        PARAMETERS,
        struct.pack("PPi", address, 0, 5),
        struct.pack("P", 12345),
        struct.pack("f", 1.5),
        struct.pack("i", -2),
    ]


def test_the_launch_has_the_declared_shape(driver: Driver) -> None:
    kernel = Kernel("k.cu", "k", "i", 64, shared_bytes=1000, cluster=2, overlap=True)
    config = launch(driver, kernel, (4, 5), (1,))
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (4, 5, 1)
    assert (config.blockDimX, config.sharedMemBytes, int(config.hStream)) == (64, 1000, 99)
    cluster, overlap = config.attrs
    assert cluster.value.clusterDim.x == 2
    assert overlap.value.programmaticStreamSerializationAllowed == 1
    assert launch(driver, kernel, (4, 5), (1,)) is config  # nothing is rebuilt for a known grid


def test_kernels_overlap_only_where_the_hardware_can(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "device_arch", lambda _: "sm_89")
    config = launch(driver, Kernel("k.cu", "k", "i", 64, overlap=True), (1,), (1,))
    assert config.numAttrs == 0


def test_a_refused_launch_names_the_kernel(driver: Driver) -> None:
    kernel = Kernel("k.cu", "k", "i", 64, constants={"ROWS": 3})
    launch(driver, kernel, (1,), (1,))
    driver.status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(KernelError, match="k ROWS=3: CUDA_ERROR_INVALID_VALUE"):
        launch(driver, kernel, (1,), (1,))


def int8_weight(rows: int, columns: int) -> CudaWeight:
    weight = W8Weight.quantize(torch.randn(rows, columns))
    return CudaWeight(
        pack_blocks(weight),
        torch.ones(-(-rows // 128) * 128),
        None,
        Policy(bits=8),
        (rows, columns),
        Device("x", "sm_90a", 132),
        gemm_cuda._inbox(torch.device("cpu")),
        *gemm_cuda._parts(torch.device("cpu")),
    )


@contextmanager
def recorded_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """(kernel, device, grid, arguments) of launches that are not made."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(gemm_cuda, "tensor_map", lambda *_: PARAMETERS)
        patch.setattr(Kernel, "__call__", lambda self, *call: seen.append((self, *call)))
        yield seen


def assert_packs(kernel: Kernel, arguments: tuple[Any, ...]) -> None:
    """There are as many arguments as the kernel has parameters, and of those kinds."""
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
    struct.Struct("".join(kernel.parameter_formats())).pack(*values)


@pytest.mark.parametrize(
    ("tile", "tokens", "grid"),
    [
        (Tile("small", 128, 16, cluster=2, interleave=2), 33, (4, 3)),
        (Tile("portable", 64, 32, interleave=2), 33, (2, 3)),
        (Tile("large", 128, 128), 300, (6,)),
        (Tile("large", 128, 256, cluster=2), 300, (8,)),  # two pairs of tiles, both split along K
    ],
    ids=str,
)
def test_gemm_grids_and_operands(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tile: Tile, tokens: int, grid: tuple[int, ...]
) -> None:
    prepared = int8_weight(192, 576)
    x = quantize_activation(torch.randn(tokens, 576))
    with recorded_launches(monkeypatch) as seen:
        out = prepared.apply_tile(x, None, torch.float16, tile)
    ((kernel, _, found_grid, arguments),) = seen
    assert_packs(kernel, arguments)
    assert (out.shape, found_grid) == ((tokens, 192), grid)
    operands = (prepared.packed, prepared.scale, None, None, x.scale, x.row_sum)
    first = next(i for i, argument in enumerate(arguments) if argument is prepared.packed)
    assert all(a is b for a, b in zip(arguments[first:], operands, strict=False))
    assert arguments[first + 6 : first + 11] == (tokens, 192, 576, 5, 0)


def test_tokens_are_read_up_to_a_whole_tile_where_there_is_room() -> None:
    wide, narrow = Tile("large", 128, 128), Tile("small", 128, 16)
    roomy = QuantizedActivation.empty(300, 576, torch.device("cpu")).codes
    tight = torch.empty(300, 576, dtype=torch.int8)
    read = {
        (name, tile): gemm_cuda._with_room(codes, tile)
        for name, codes in (("roomy", roomy), ("tight", tight), ("part", tight[7:107]))
        for tile in (wide, narrow)
    }
    assert [len(codes) for codes in read.values()] == [384, 300, 300, 300, 128, 100]
    assert all(codes.stride() == (576, 1) for codes in read.values())
    assert read["part", wide].data_ptr() == tight[7].data_ptr()


def launch_with_norm(
    monkeypatch: pytest.MonkeyPatch, prepared: CudaWeight, tile: Tile, tokens: int
) -> tuple[Kernel, tuple[int, ...], list[Any]]:
    """The kernel, its grid, and what it is given after the norm's fields, which are in their place."""
    x = quantize_activation(torch.randn(tokens, 128))
    residual, gain = torch.randn(tokens, 4096).half(), torch.ones(4096)
    with recorded_launches(monkeypatch) as seen:
        out, total = linear_rms_norm_quantize(
            x, prepared, None, torch.float16, gain, 1e-5, residual, tile
        )
    ((kernel, _, grid, arguments),) = seen
    assert_packs(kernel, arguments)
    fields = (residual, gain, total, 1e-5, out.codes, out.scale, out.row_sum)
    first = next(i for i, argument in enumerate(arguments) if argument is residual)
    assert all(a is b for a, b in zip(arguments[first:], fields, strict=False))
    return kernel, grid, [arguments[first - 1], *arguments[first + len(fields) :]]


@pytest.mark.parametrize(("tokens", "workers"), [(1, 1), (33, 32), (200, 128), (300, 66)])
def test_a_gemm_of_few_tokens_goes_on_with_a_norm(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tokens: int, workers: int
) -> None:
    prepared, tile = int8_weight(4096, 128), Tile("small", 128, 64)
    kernel, grid, others = launch_with_norm(monkeypatch, prepared, tile, tokens)
    assert kernel.entry == "w4a8_gemm_small_norm" and grid == (32, -(-tokens // 64))
    assert others[0].data_ptr() == prepared.inbox.data_ptr()
    assert others[1:] == [workers]  # rows, blocks, blocks, half of the multiprocessors


@pytest.mark.parametrize(("tokens", "blocks"), [(300, 64), (1024, 128), (3000, 128)])
def test_a_gemm_of_many_tokens_goes_on_with_a_norm(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tokens: int, blocks: int
) -> None:
    """With all blocks of some token tiles at once, and no others."""
    prepared, tile = int8_weight(4096, 128), Tile("large", 128, 256)
    kernel, grid, others = launch_with_norm(monkeypatch, prepared, tile, tokens)
    assert kernel.entry == "w4a8_gemm_large_norm" and grid == (blocks,)
    assert others[0] == -(-tokens // 256) * 32
    assert others[1] is prepared.parts and others[2] is prepared.turns
    assert kernel.constants["TILE_GROUP"] == 4


@pytest.mark.parametrize(("rows", "early"), [(8, True), (9, False)])
def test_many_rows_of_silu_wait_for_the_gemm(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, rows: int, early: bool
) -> None:
    with recorded_launches(monkeypatch) as seen:
        silu_mul_quantize(torch.randn(rows, 512).half())
    assert seen[0][0].overlap == early


def test_a_norm_goes_with_batches_that_a_launch_can_share_out() -> None:
    sizes = (0, 1, 64, 128, 300, 1024, 4096, 20000)
    x = [quantize_activation(torch.randn(tokens, 128)) for tokens in sizes]
    fused = {
        rows: [len(at.codes) for at in x if fuses(at, int8_weight(rows, 128))]
        for rows in (1024, 2048, 4096, 8192, 9216)
    }
    assert fused == {
        1024: [],
        2048: [1, 64, 128, 1024, 4096, 20000],  # at 300 a small GEMM is fastest, but has few blocks
        4096: [1, 64, 128, 300, 1024, 4096],  # at 20000 there are too many parts
        8192: [1, 64, 128, 300, 1024, 4096],
        9216: [],
    }


def test_a_norm_does_not_go_with_a_gemm_that_would_take_more_waves() -> None:
    """Of 5120 rows, three token tiles at once are 120 of 132 blocks."""
    prepared = int8_weight(5120, 384)
    alone, paired = Tile("large", 128, 256), Tile("large", 128, 256, cluster=2)
    assert prepared.token_tiles_at_once(alone) == 3
    tokens = (768, 1024, 1792, 4096)  # 120, 160, 280 and 640 tiles
    assert [prepared.waves(count, alone) for count in tokens] == [1, 2, 3, 5]
    assert [prepared.waves(count, paired) for count in tokens] == [1, 1.5, 2.5, 5]
    x = [quantize_activation(torch.randn(count, 384)) for count in tokens]
    assert [len(at.codes) for at in x if fuses(at, prepared)] == [768]


def test_a_norm_goes_with_no_more_tokens_than_a_launch_has_room_for() -> None:
    prepared, longest = int8_weight(4096, 128), int8_weight(132 * 128, 128)
    assert has_room(512, prepared, Tile("small", 128, 64))
    assert not has_room(513, prepared, Tile("small", 128, 64))
    assert has_room(16384, prepared, Tile("large", 128, 128))
    assert not has_room(16385, prepared, Tile("large", 128, 128))
    assert has_room(1, longest, Tile("large", 128, 128))
    assert not has_room(1, int8_weight(132 * 128 + 64, 128), Tile("large", 128, 128))


@pytest.mark.parametrize(
    "tile",
    [
        Tile("portable", 64, 64, interleave=2),
        Tile("large", 128, 256, cluster=2),
        Tile("large", 256, 128),
    ],
    ids=str,
)
def test_a_norm_goes_with_some_tiles(tile: Tile) -> None:
    prepared = int8_weight(4096, 128)
    assert not has_room(1, prepared, tile)
    others = {tile_for(tokens, prepared) for tokens in range(1, 8192, 64)}
    assert all(has_room(1, prepared, other) for other in others)


def test_a_norm_of_other_sizes_is_refused() -> None:
    prepared = int8_weight(4096, 128)
    x = quantize_activation(torch.randn(40, 128))
    residual, gain = torch.randn(40, 4096).half(), torch.ones(4096)
    with pytest.raises(OpError, match="norm_weight must have shape"):
        linear_rms_norm_quantize(x, prepared, None, torch.float16, gain[1:], 1e-5, residual)
    with pytest.raises(OpError, match=r"residual must be torch\.float16"):
        linear_rms_norm_quantize(x, prepared, None, torch.float16, gain, 1e-5, residual.float())
    with pytest.raises(OpError, match=r"40 tokens are too many for Tile\(kind='portable'"):
        tile = Tile("portable", 64, 64, interleave=2)
        linear_rms_norm_quantize(x, prepared, None, torch.float16, gain, 1e-5, residual, tile)
    with pytest.raises(OpError, match="residual must be contiguous"):
        strided = torch.randn(4096, 40).half().T
        linear_rms_norm_quantize(x, prepared, None, torch.float16, gain, 1e-5, strided)


def test_tensor_maps_pass_sizes_innermost_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Driver()
    calls: list[Any] = []

    def encode(*arguments: Any) -> Any:
        calls.append(arguments)
        return fake.CUresult.CUDA_SUCCESS, SimpleNamespace(opaque=range(16))

    fake.cuTensorMapEncodeTiled = encode  # type: ignore[attr-defined]
    monkeypatch.setattr(tensor_map, "driver", lambda: fake)
    matrix = torch.zeros(37, 64, dtype=torch.int8)
    assert tensor_map.tensor_map(matrix, (16, 128)) == struct.pack("16Q", *range(16))
    _, rank, address, sizes, pitches, box = calls[0][:6]
    assert (rank, address) == (2, matrix.data_ptr())
    assert [[int(v) for v in list_] for list_ in (sizes, pitches, box)] == [
        [64, 37],
        [64],
        [128, 16],
    ]
