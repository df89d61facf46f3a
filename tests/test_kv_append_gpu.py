"""RoPE, quantize and paged write on a GPU: the reference's bytes."""

from __future__ import annotations

import pytest
import torch

from qserve.formats.kv import KVFormat, unpack_codes, unpack_scales
from qserve.kernels import OpError, rope_append
from qserve.testing.paging import random_batch, random_pool

pytestmark = pytest.mark.gpu

SHAPES = [(128, 32, 8), (128, 8, 8), (128, 7, 1), (64, 9, 3), (64, 16, 4)]
CONTEXTS, QUERIES = [1, 64, 65, 300, 130], [1, 1, 65, 170, 2]


def append_on_both(
    kv_format: KVFormat, query_heads: int, dtype: torch.dtype, hadamard: bool, centered: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """q and the pool, from the reference and from the GPU."""
    batch = random_batch(CONTEXTS, QUERIES, num_pages=16)
    pool = random_pool(kv_format, 16)
    width = (query_heads + 2 * kv_format.num_kv_heads) * kv_format.head_dim
    scales = 10 ** torch.empty(sum(QUERIES), 1).uniform_(-2, 2)
    qkv = (torch.randn(sum(QUERIES), width) * scales).to(dtype)
    qkv[3] = 2.5  # constant rows
    angles = torch.rand(512, kv_format.head_dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    on_gpu = type(batch)(
        **{
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in vars(batch).items()
        }
    )
    center = torch.randn(kv_format.num_kv_heads, kv_format.head_dim) if centered else None
    gpu_center = None if center is None else center.cuda()
    gpu_pool, options = pool.cuda(), (kv_format, query_heads, hadamard)
    gpu_q = rope_append(qkv.cuda(), table.cuda(), on_gpu, gpu_pool, *options, gpu_center)
    q = rope_append(qkv, table, batch, pool, *options, center)
    return (q, pool), (gpu_q.cpu(), gpu_pool.cpu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("dim", "query_heads", "kv_heads"), SHAPES)
def test_append_writes_the_reference_bytes(
    dim: int, query_heads: int, kv_heads: int, centered: bool, bits: int, dtype: torch.dtype
) -> None:
    kv_format = KVFormat(bits, dim, kv_heads, dtype)
    expected, found = append_on_both(kv_format, query_heads, dtype, False, centered)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dim", "query_heads", "kv_heads"), SHAPES)
def test_append_with_hadamard_differs_by_rounding_alone(
    dim: int, query_heads: int, kv_heads: int, bits: int
) -> None:
    kv_format = KVFormat(bits, dim, kv_heads)
    expected, found = append_on_both(kv_format, query_heads, torch.float16, True, True)
    # A small element may be the difference of large ones: float32 rounds by the head's largest. And
    # the smallest float16 lie 2^-24 apart.
    largest = expected[0].float().abs().amax(-1, keepdim=True)
    difference = (found[0].float() - expected[0].float()).abs()
    assert (difference <= 2e-3 * expected[0].float().abs() + 1e-6 * largest + 2**-24).all()
    codes, expected_codes = (
        torch.cat(unpack_codes(pool, kv_format, torch.int32)) for pool in (found[1], expected[1])
    )
    assert (codes - expected_codes).abs().max() <= 1
    assert (codes != expected_codes).float().mean() < 1e-3
    for side in range(2):
        torch.testing.assert_close(
            unpack_scales(found[1], kv_format)[side],
            unpack_scales(expected[1], kv_format)[side],
            rtol=2e-3,
            atol=1e-5,
        )


def test_append_refuses_what_it_does_not_serve() -> None:
    with pytest.raises(OpError, match="float32 is not served"):
        append_on_both(KVFormat(4, 64, 3), 9, torch.float32, False, False)
