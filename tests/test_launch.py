"""What a launch hands to the driver, seen by a driver that only remembers."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.core")

from qserve.formats.activation import quantize_activation
from qserve.formats.weight import W8Weight
from qserve.kernels import gemm_cuda, jit, tensor_map
from qserve.kernels.gemm_cuda import CudaWeight, pack_blocks
from qserve.kernels.gemm_variants import Policy
from qserve.kernels.jit import Kernel, KernelError
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
    weight = W8Weight.quantize(torch.randn(192, 576))
    prepared = CudaWeight(
        pack_blocks(weight),
        torch.ones(256),
        None,
        Policy(bits=8),
        (192, 576),
        Device("x", "", 132),
        torch.zeros(2, dtype=torch.int32),
    )
    monkeypatch.setattr(gemm_cuda, "tensor_map", lambda *_: PARAMETERS)
    seen: list[Any] = []
    monkeypatch.setattr(Kernel, "__call__", lambda self, *call: seen.append((self, *call)))
    x = quantize_activation(torch.randn(tokens, 576))
    out = prepared.apply_tile(x, None, torch.float16, tile)
    ((kernel, _, found_grid, arguments),) = seen
    formats = "".join(kernel.parameter_formats())
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
    struct.Struct(formats).pack(*values)  # as many, and of those kinds
    assert (out.shape, found_grid) == ((tokens, 192), grid)
    operands = (prepared.packed, prepared.scale, None, None, x.scale, x.row_sum)
    first = next(i for i, argument in enumerate(arguments) if argument is prepared.packed)
    assert all(a is b for a, b in zip(arguments[first:], operands, strict=False))
    assert arguments[first + 6 : first + 11] == (tokens, 192, 576, 5, 0)


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
