"""Drawing tokens beside torch's way to do it, and beside reading the logits once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from qserve.benchmark.attention import measure_copy_bandwidth
from qserve.kernels.draw import draw_tokens, pack_draws
from qserve.testing.timing import Timing, copies_beyond_cache, time_interleaved

VOCAB = 128256
ROWS = (1, 16, 64, 128, 256)
DTYPE = torch.float16
MAX_COPIES = 64
CHECKED_ROWS = 16


@dataclass(frozen=True)
class Setting:
    """Parameters that all rows share; as in `kernels.draw.DRAW`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def draws(self, rows: int) -> Tensor:
        """uint8 [rows, 32], each row with noise of its own."""
        rest = (self.top_p, self.min_p, self.temperature, self.top_k)
        return torch.from_numpy(pack_draws([(row / rows, *rest) for row in range(rows)]))


SETTINGS = {
    "greedy": Setting(temperature=0.0),
    "temperature": Setting(),
    "top_k 50": Setting(top_k=50),
    "top_p 0.9": Setting(top_p=0.9),
    "min_p 0.05": Setting(min_p=0.05),
    "top_k 50, top_p 0.9": Setting(top_k=50, top_p=0.9),
}


@dataclass(frozen=True)
class DrawRow:
    """Microseconds of drawing a token for each row: ours, torch's, and of reading the logits once at
    the copy bandwidth."""

    setting: str
    rows: int
    ours: Timing
    library: Timing
    one_read: float

    def __str__(self) -> str:
        return (
            f"{self.setting:20s} B={self.rows:<4d} ours {self.ours.median:8.1f} us"
            f"  torch {self.library.median:9.1f}  one read {self.one_read:6.1f}"
        )


def bench_sampling(as_json: bool = False) -> list[DrawRow]:
    """Check, then time, every setting at every number of rows; print them."""
    rows = []
    for row in _rows(measure_copy_bandwidth()):
        rows.append(row)
        if not as_json:
            print(row, flush=True)
    if as_json:
        device = torch.cuda.get_device_name()
        print(json.dumps({"device": device, "rows": [asdict(row) for row in rows]}))
    return rows


def _rows(copy_bandwidth: float) -> Iterator[DrawRow]:
    for count in ROWS:
        nbytes = count * VOCAB * DTYPE.itemsize
        copies = min(MAX_COPIES, copies_beyond_cache(nbytes))
        logits = [3 * torch.randn(count, VOCAB, device="cuda").to(DTYPE) for _ in range(copies)]
        for name, setting in SETTINGS.items():
            draws = setting.draws(count)
            _check(logits[0], draws)
            on_device = draws.cuda()
            times = time_interleaved(
                {
                    "ours": [partial(draw_tokens, x, on_device) for x in logits],
                    "torch": [partial(library_draw, x, setting) for x in logits],
                }
            )
            one_read = nbytes / copy_bandwidth * 1e6
            yield DrawRow(name, count, times["ours"], times["torch"], one_read)


def library_draw(logits: Tensor, setting: Setting) -> Tensor:
    """int64 [B], as is usual in torch: sorted where a filter needs it, exponential noise."""
    if setting.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / setting.temperature
    if setting.top_k:
        least = scaled.topk(setting.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if setting.top_p < 1:
        ordered, token_ids = probabilities.sort(dim=-1, descending=True)
        barred = ordered.cumsum(dim=-1) - ordered >= setting.top_p
        probabilities = probabilities.scatter(1, token_ids, ordered.masked_fill(barred, 0))
    if setting.min_p:
        least = setting.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


def _check(logits: Tensor, draws: Tensor) -> None:
    """Some rows against the reference; the last bit of an exponential may move one of them."""
    logits, draws = logits[:CHECKED_ROWS], draws[:CHECKED_ROWS]
    found, expected = draw_tokens(logits, draws.cuda()).cpu(), draw_tokens(logits.cpu(), draws)
    assert (found != expected).sum() <= 1, f"drawn {found.tolist()}, not {expected.tolist()}"
