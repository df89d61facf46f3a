"""Whole token sequences through a decoder, over the pages and with the ops that serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qserve.config import EngineConfig
from qserve.engine.kv_cache import kv_format_of
from qserve.engine.loading import LoadedModel, load_model
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.paged import PagedBatch
from qserve.models.attention import PagedAttention
from qserve.models.rope import rope_table
from qserve.models.source import WeightSource, open_source

CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Tokens computed at once; what they take stays below about 2 GB for a model of 8 B parameters."""

_LOGITS = 2**26
"""Logits held at once."""

TokenIds = Sequence[int]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model as it is served, and the source it was loaded from."""

    source: WeightSource
    model: LoadedModel

    @classmethod
    def open(cls, model: str | Path | WeightSource, config: EngineConfig) -> EvaluatedModel:
        """Load a directory, hub id, GGUF file or source; raises ModelError or ConfigError."""
        source = open_source(str(model)) if isinstance(model, str | Path) else model
        return cls(source, load_model(source, config))


@dataclass(frozen=True)
class Score:
    """How likely a sequence's tokens were, but for its first.

    logprobs: float32 [n - 1], natural. is_likeliest: bool [n - 1], no other token was likelier.
    """

    logprobs: Tensor
    is_likeliest: Tensor


class SequenceScorer:
    """Scores sequences under a model; each stands alone, and batching changes nothing on a CPU."""

    def __init__(self, model: LoadedModel) -> None:
        self.decoder = model.decoder
        self._kv_format = kv_format_of(model.decoder, model.quantization.kv_bits)
        self._hadamard = model.quantization.k_hadamard
        self.max_length = model.decoder.config.max_positions + 1
        self._rope_table = rope_table(model.decoder.config, self.max_length).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def score(self, sequences: Sequence[TokenIds], progress: bool = False) -> list[Score]:
        """One score each, on the CPU, in the order of the sequences.

        A sequence's last token is scored and never read, so it may stand one past the model's last
        position. Raises ValueError before any work if a sequence is longer, or has no second token.
        progress: show a bar on stderr.
        """
        for sequence in sequences:
            self._check(len(sequence))
        scores: list[Score] = []
        console = Console(stderr=True)
        with Progress(console=console, disable=not progress, transient=True) as bar:
            task = bar.add_task("scoring", total=len(sequences))
            for batch in self._batches(sequences):
                scores += self._score(batch)
                bar.advance(task, len(batch))
        return scores

    def attention(self, lengths: Sequence[int]) -> PagedAttention:
        """What the decoder attends with, for sequences of these lengths, flattened.

        All layers share one layer's pages: a whole sequence is read in the step that writes it.
        """
        batch = whole_sequences(lengths, self.device)
        pool = self._kv_format.new_pool(sum(map(_pages, lengths)), self.device)
        return PagedAttention(
            self.decoder.config,
            batch,
            pool.expand(self.decoder.config.num_layers, *pool.shape),
            self._rope_table,
            self._kv_format,
            self._hadamard,
            self.decoder.key_centers,
        )

    @torch.inference_mode()
    def _score(self, sequences: Sequence[TokenIds]) -> list[Score]:
        inputs = [token for sequence in sequences for token in sequence[:-1]]
        targets = [token for sequence in sequences for token in sequence[1:]]
        lengths = [len(sequence) - 1 for sequence in sequences]
        token_ids = torch.tensor(inputs, device=self.device)
        hidden = self.decoder.forward(token_ids, self.attention(lengths))
        logprobs, likeliest = self._rows(hidden, torch.tensor(targets, device=self.device))
        pieces = zip(logprobs.split(lengths), likeliest.split(lengths), strict=True)
        return [Score(*piece) for piece in pieces]

    def _rows(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The fields of `Score` for hidden states [T, H] and the tokens [T] that follow them."""
        rows = max(1, _LOGITS // self.decoder.config.vocab_size)
        logprobs, likeliest = [], []
        for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self.decoder.logits(states).float()
            chosen = logits.gather(1, tokens[:, None])[:, 0]
            logprobs.append((chosen - logits.logsumexp(dim=-1)).cpu())
            likeliest.append((chosen >= logits.amax(dim=-1)).cpu())
        return torch.cat(logprobs), torch.cat(likeliest)

    def _batches(self, sequences: Sequence[TokenIds]) -> Iterator[Sequence[TokenIds]]:
        """Neighbours that fit the tokens computed at once, one at the least."""
        limit = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        start, tokens = 0, 0
        for index, sequence in enumerate(sequences):
            if index > start and tokens + len(sequence) - 1 > limit:
                yield sequences[start:index]
                start, tokens = index, 0
            tokens += len(sequence) - 1
        if sequences:
            yield sequences[start:]

    def _check(self, length: int) -> None:
        if length < 2:
            raise ValueError(f"a sequence must have at least 2 tokens, got {length}")
        if length > self.max_length:
            raise ValueError(
                f"a sequence of {length} tokens exceeds the model's {self.max_length - 1} positions"
            )


def whole_sequences(lengths: Sequence[int], device: torch.device) -> PagedBatch:
    """All tokens of sequences of these lengths in one step, on pages in order."""
    pages = [_pages(length) for length in lengths]
    table = pad_sequence(list(torch.arange(sum(pages)).split(pages)), batch_first=True)
    return PagedBatch.of_lengths(lengths, lengths, table, device)


def _pages(length: int) -> int:
    return -(-length // PAGE_TOKENS)
