"""An engine under random load for as long as asked: it must lose no page and answer every request.

Requests of all kinds come in bursts, many with prompts that begin alike; some are aborted. The cache
is small, so that sequences are preempted. Needs a config.json only: the weights are random.

    python benchmarks/soak.py --config benchmarks/configs/llama-3-8b --seconds 60
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

from qserve.benchmark.dummy import dummy_engine
from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import RequestOutput, SamplingParams

CHECK_EVERY = 50
"""Steps."""


class Soak:
    """Random load; everything is drawn from one seed."""

    def __init__(self, engine: Engine, max_requests: int, seed: int) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._draw = random.Random(seed)
        vocabulary = range(engine.model.vocab_size)
        length = engine.max_model_len // 2
        self._beginnings = [self._draw.choices(vocabulary, k=length) for _ in range(8)]
        self._vocabulary = vocabulary
        self._missing: dict[str, dict[int, int | None]] = {}
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        """Load for `seconds`, then until all is answered."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._burst()
            self._step()
        while self._engine.has_unfinished:
            self._step()
        self._engine.check_integrity()
        assert not self._missing, f"{len(self._missing)} requests were never answered"
        assert self._engine.stats.pages_used == 0

    def _burst(self) -> None:
        """New requests now and then, and aborts."""
        if self._draw.random() < 0.1 and len(self._missing) < self._max_requests:
            for _ in range(self._draw.randrange(1, 1 + self._max_requests // 4)):
                self._add()
        if self._draw.random() < 0.03 and self._missing:
            self._abort(self._draw.choice(list(self._missing)))

    def _add(self) -> None:
        request_id = str(self.counts["requests"])
        params = self._params()
        self._engine.add_request(request_id, self._prompt(), params)
        self._missing[request_id] = dict.fromkeys(range(params.n), params.max_tokens)
        self.counts["requests"] += 1

    def _abort(self, request_id: str) -> None:
        self._engine.abort(request_id)
        del self._missing[request_id]
        self.counts["aborts"] += 1

    def _prompt(self) -> list[int]:
        beginning = self._draw.choice(self._beginnings)
        shared = self._draw.choice((0, self._draw.randrange(len(beginning))))
        own = self._draw.choices(self._vocabulary, k=self._draw.randrange(1, len(beginning) // 2))
        return beginning[:shared] + own

    def _params(self) -> SamplingParams:
        draw = self._draw
        return SamplingParams(
            max_tokens=draw.randrange(1, self._engine.max_model_len // 4),
            temperature=draw.choice((0.0, 1.0)),
            top_k=draw.choice((0, 0, 5)),
            top_p=draw.choice((1.0, 1.0, 0.9)),
            repetition_penalty=draw.choice((1.0, 1.0, 1.2)),
            seed=draw.choice((None, draw.randrange(1000))),
            n=draw.choice((1, 1, 1, 3)),
            logprobs=draw.choice((None, None, 2)),
            prompt_logprobs=draw.choice((None, None, None, 1)),
            stop_token_ids=draw.choice(((), tuple(self._vocabulary[3::50]))),
        )

    def _step(self) -> None:
        for output in self._engine.step():
            self._take(output)
        self.counts["steps"] += 1
        if self.counts["steps"] % CHECK_EVERY == 0:
            self._engine.check_integrity()

    def _take(self, output: RequestOutput) -> None:
        missing = self._missing[output.request_id]
        for part in output.outputs:
            left = missing[part.index]
            assert left is not None and left > 0, f"{output.request_id} got more than it asked for"
            missing[part.index] = None if part.finish_reason else left - len(part.token_ids)
            self.counts["tokens"] += len(part.token_ids)
        if output.finished:
            assert set(missing.values()) == {None}, f"{output.request_id} ended early"
            del self._missing[output.request_id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--num-pages", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = EngineConfig(
        max_num_sequences=options.max_batch,
        max_batched_tokens=4 * options.max_batch,
        max_model_len=512,
        num_pages=options.num_pages,
    )
    engine = dummy_engine(options.config, options.group_size, config)
    soak = Soak(engine, 2 * options.max_batch, options.seed)
    start = time.monotonic()
    soak.run(options.seconds)
    stats = engine.stats
    counts = ", ".join(f"{value:,} {name}" for name, value in soak.counts.items())
    print(
        f"{time.monotonic() - start:.0f} s: {counts}, {stats.preemptions:,} preemptions, "
        f"{stats.cached_tokens:,} cached tokens; every page is back"
    )


if __name__ == "__main__":
    main()
