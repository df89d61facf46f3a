"""Drawing tokens: the reference by definition, the kernel on a CPU and on a GPU by the reference."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import shutil
from collections.abc import Iterator

import numpy
import pytest
import torch
from emulator import Emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qserve.kernels import OpError, draw_cuda, draw_tokens, jit
from qserve.kernels.draw import DRAW, LARGEST_SHARE, _bar, _least_of_top_p, pack_draws
from qserve.kernels.jit import Kernel
from qserve.kernels.op import FLOAT_DTYPES

ONE_BELOW = 1 - 2.0**-52
PLAIN = {"noise": 0.5, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "top_k": 0}
EDGES = (
    {},
    {"noise": 0.0},
    {"noise": ONE_BELOW},
    {"temperature": 0.0, "top_k": 5, "noise": 0.9},
    {"temperature": 1e-30, "noise": 0.9},
    {"temperature": 100.0, "noise": 0.77},
    {"top_k": 1, "noise": 0.9},
    {"top_k": 3, "noise": ONE_BELOW},
    {"top_k": 2**31 - 1, "noise": ONE_BELOW},
    {"top_p": 1e-12, "noise": 0.9},
    {"top_p": 0.5, "noise": ONE_BELOW},
    {"top_p": 1 - 1e-12, "noise": ONE_BELOW},
    {"min_p": 1.0, "noise": 0.9},
    {"min_p": 1e-9, "noise": ONE_BELOW},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7, "noise": 0.6},
)
"""Changes to PLAIN."""


def pack(*changes: dict[str, float]) -> Tensor:
    rows = [tuple((PLAIN | change)[name] for name in DRAW.names or ()) for change in changes]
    return torch.from_numpy(pack_draws(rows))


def random_draws(rows: int, seed: int = 0) -> Tensor:
    generator = numpy.random.default_rng(seed)
    choices = {
        "noise": generator.random(rows),
        "temperature": generator.choice([0, 0.3, 1, 1.5], rows),
        "top_k": generator.choice([0, 0, 1, 7, 50], rows),
        "top_p": generator.choice([1, 0.9, 0.5, 0.01], rows),
        "min_p": generator.choice([0, 0, 1e-3, 0.1], rows),
    }
    return pack(*({name: values[row] for name, values in choices.items()} for row in range(rows)))


def difficult_rows(vocab: int) -> Tensor:
    """float32 [n, vocab]: ties everywhere, few tokens or only one allowed, one far above others."""
    rows = {
        "equal": torch.full((vocab,), 3.0),
        "two values": torch.randint(0, 2, (vocab,)).float(),
        "halves": torch.randint(-9, 9, (vocab,)) / 2,
        "few allowed": torch.full((vocab,), -math.inf),
        "the last alone": torch.full((vocab,), -math.inf),
        "peaked": torch.randn(vocab),
        "wide": torch.randn(vocab) * 3000,
    }
    rows["few allowed"][vocab // 3 :: max(1, vocab // 5)] = torch.tensor(-2.0)
    rows["the last alone"][-1] = -7
    rows["peaked"][vocab // 2] = 60
    return torch.stack(list(rows.values()))


def every_edge(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Every row under every edge."""
    return logits.repeat_interleave(len(EDGES), 0), pack(*EDGES).repeat(len(logits), 1)


# ---- the reference --------------------------------------------------------------------------


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [1000, 0, 0]), (0.501, [1000, 999, 0])])
def test_top_p_is_exact_to_the_last_unit(top_p: float, kept: list[int]) -> None:
    shares = torch.tensor([[1000, 999, 1]], dtype=torch.int32)
    settings_ = pack({"top_p": top_p}).numpy().view(DRAW)[:, 0]
    _bar(shares, settings_, settings_["top_p"] < 1, _least_of_top_p)
    assert shares.tolist() == [kept]


def kept_by_definition(shares: list[int], draw: dict[str, float]) -> dict[int, int]:
    """Token -> share, of those that the filters leave, by sorting."""
    kept = dict(enumerate(shares))

    def least(bound: float) -> None:
        for token in [token for token, share in kept.items() if share < bound]:
            del kept[token]

    ranked = sorted(shares, reverse=True)
    if draw["top_k"]:
        least(ranked[min(int(draw["top_k"]), len(ranked)) - 1])
    ranked = sorted(kept.values(), reverse=True)
    sums = numpy.cumsum(ranked)
    if draw["top_p"] < 1:
        least(ranked[int(numpy.argmax(sums >= math.ceil(draw["top_p"] * int(sums[-1]))))])
    least(math.ceil(draw["min_p"] * LARGEST_SHARE))
    return kept


filters = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 9),
        "top_p": st.floats(1e-6, 1, exclude_max=True),
        "min_p": st.floats(0, 1),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-80, 80), min_size=1, max_size=8),
    draw=filters,
    noise=st.floats(0, ONE_BELOW),
)
def test_the_token_is_where_the_noise_falls_among_the_kept(
    logits: list[int], draw: dict[str, float], noise: float
) -> None:
    values = torch.tensor([logits]) / 4
    weights = ((values - values.max()) * 1.0).exp()
    shares = (weights * 2.0**30).round().clamp(max=LARGEST_SHARE).long()[0].tolist()
    kept = kept_by_definition(shares, PLAIN | draw)
    threshold = int(noise * sum(kept.values()))
    for expected, share in kept.items():  # noqa: B007
        threshold -= share
        if threshold < 0:
            break
    assert draw_tokens(values, pack({"noise": noise} | draw)).tolist() == [expected]


def test_greedy_is_the_first_of_the_likeliest_whatever_the_rest_says() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]]).expand(3, -1)
    noisy = {"temperature": 0.0, "noise": 0.99}
    draws = pack(noisy, noisy | {"top_k": 3, "top_p": 0.1}, noisy | {"min_p": 1.0})
    assert draw_tokens(logits, draws).tolist() == [1, 1, 1]


def test_zero_noise_takes_the_first_token_that_is_possible() -> None:
    logits = torch.tensor([[-math.inf, -math.inf, 0.0, 1.0]])
    assert draw_tokens(logits, pack({"noise": 0.0})).tolist() == [2]
    assert draw_tokens(logits, pack({"noise": ONE_BELOW})).tolist() == [3]


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_any_token_of_what_is_no_number(value: float) -> None:
    logits = torch.full((len(EDGES), 5), value)
    assert set(draw_tokens(logits, pack(*EDGES)).tolist()) <= set(range(5))


def test_the_contract_names_what_breaks_it() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(OpError, match="draw_tokens: draws must have shape"):
        draw_tokens(logits, pack({}))
    with pytest.raises(OpError, match=r"logits must be torch\.float16 or"):
        draw_tokens(logits.double(), pack({}, {}))
    with pytest.raises(OpError, match="there must be a token"):
        draw_tokens(logits[:, :0], pack({}, {}))
    assert draw_tokens(logits[:0], pack()).tolist() == []


# ---- the kernel, on a CPU -------------------------------------------------------------------

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def exp_of_libm(x: Tensor) -> Tensor:
    """The exponential that the emulated kernel calls, so that shares are equal to the last bit."""
    expf = ctypes.CDLL(ctypes.util.find_library("m")).expf
    expf.argtypes, expf.restype = [ctypes.c_float], ctypes.c_float
    return torch.tensor([expf(value) for value in x.flatten().tolist()]).view_as(x)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """Every kernel launched where this is used runs here, its outputs poisoned."""
    emulator = Emulator(tmp_path_factory.mktemp("emulator"))
    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "CSRC", emulator.sources)
        patch.setattr(Kernel, "__call__", lambda *arguments: emulator.launch(*arguments))
        patch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(-1))
        patch.setattr(Tensor, "exp", exp_of_libm)
        yield emulator


@emulated
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "rows"), [(1, 3), (33, 20), (1000, 40), (32003, 8), (128256, 4)])
def test_emulated_kernel(emulator: Emulator, vocab: int, rows: int, dtype: torch.dtype) -> None:
    emulator.seed = vocab
    logits = (torch.randn(rows, vocab) * torch.empty(rows, 1).uniform_(0.5, 6)).to(dtype)
    draws = random_draws(rows, vocab)
    assert torch.equal(draw_cuda.draw_tokens(logits, draws), draw_tokens(logits, draws))


@emulated
@pytest.mark.parametrize("vocab", [5, 2050])
def test_emulated_kernel_at_the_edges(emulator: Emulator, vocab: int) -> None:
    logits, draws = every_edge(difficult_rows(vocab))
    assert torch.equal(draw_cuda.draw_tokens(logits, draws), draw_tokens(logits, draws))


@emulated
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_emulated_kernel_of_what_is_no_number(emulator: Emulator, value: float) -> None:
    logits = torch.full((len(EDGES), 70), value)
    assert set(draw_cuda.draw_tokens(logits, pack(*EDGES)).tolist()) <= set(range(70))
    logits[:, ::2] = 1.0
    assert set(draw_cuda.draw_tokens(logits, pack(*EDGES)).tolist()) <= set(range(70))


@emulated
def test_a_row_is_drawn_alike_in_any_company(emulator: Emulator) -> None:
    logits, draws = torch.randn(12, 777).half() * 3, random_draws(12, 5)
    together = draw_cuda.draw_tokens(logits, draws)
    for seed, row in enumerate((0, 5, 11)):
        emulator.seed = seed
        alone = draw_cuda.draw_tokens(logits[row : row + 1], draws[row : row + 1])
        assert torch.equal(alone, together[row : row + 1])


@emulated
def test_a_missing_barrier_is_caught(emulator: Emulator) -> None:
    source = emulator.sources / "draw.cu"
    intact = source.read_text()
    barrier = "  __syncthreads();\n  uint64 lowest"
    assert barrier in intact
    source.write_text(intact.replace(barrier, "  uint64 lowest"))
    logits, draws = torch.randn(8, 3000), pack({"top_p": 0.5, "noise": 0.9}).repeat(8, 1)
    try:
        draw_cuda.draw_kernel.cache_clear()
        found = draw_cuda.draw_tokens(logits, draws)
        assert not torch.equal(found, draw_tokens(logits, draws))
    finally:
        source.write_text(intact)
        draw_cuda.draw_kernel.cache_clear()


# ---- the kernel, on a GPU -------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "rows"), [(1, 3), (1000, 1000), (32003, 300), (128256, 600)])
def test_kernel(vocab: int, rows: int, dtype: torch.dtype) -> None:
    """The last bit of an exponential may move a border across the noise, rarely."""
    logits = (torch.randn(rows, vocab) * torch.empty(rows, 1).uniform_(0.5, 6)).to(dtype)
    draws = random_draws(rows, vocab)
    found = draw_tokens(logits.cuda(), draws.cuda())
    assert (found.cpu() != draw_tokens(logits, draws)).sum() <= max(1, rows // 200)
    assert torch.equal(found, draw_tokens(logits.cuda(), draws.cuda()))
    for row in range(0, rows, 97):
        alone = draw_tokens(logits[row : row + 1].cuda(), draws[row : row + 1].cuda())
        assert torch.equal(alone, found[row : row + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [5, 2050, 151936])
def test_kernel_at_the_edges(vocab: int) -> None:
    """Where shares are equal on every device, so are tokens."""
    logits, draws = every_edge(difficult_rows(vocab)[:5])
    exact = torch.isinf(logits) | (logits == logits.amax(1, keepdim=True))
    logits, draws = logits[exact.all(1)], draws[exact.all(1)]
    assert len(logits) >= 3 * len(EDGES)
    found = draw_tokens(logits.cuda(), draws.cuda())
    assert torch.equal(found.cpu(), draw_tokens(logits, draws))
    logits, draws = every_edge(difficult_rows(vocab))
    found = draw_tokens(logits.cuda(), draws.cuda()).cpu()
    assert (found != draw_tokens(logits, draws)).sum() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_kernel_of_what_is_no_number(value: float) -> None:
    logits = torch.full((len(EDGES), 70), value)
    assert set(draw_tokens(logits.cuda(), pack(*EDGES).cuda()).tolist()) <= set(range(70))
