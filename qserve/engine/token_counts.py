"""How often sequences hold each token, kept where the logits are."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn.functional import pad

from qserve.engine.sequence import Sequence
from qserve.kernels.transfer import to_device

_FEWEST_ROWS = 8


class TokenCounts:
    """Counts of the sequences that ask for them, each a row of one table.

    A sampled token is counted on the device, before the host has seen it. A row is free again when
    its sequence is gone.
    """

    def __init__(self) -> None:
        # int32 [rows, V]: twice the output's count, + 1 if in the prompt
        self._table: Tensor | None = None
        self._rows: weakref.WeakKeyDictionary[Sequence, int] = weakref.WeakKeyDictionary()
        self._free: list[int] = []

    def of(self, sequences: list[Sequence], logits: Tensor) -> tuple[Tensor, Tensor]:
        """(whether prompt or output hold each token, its count in the output) as in logits [n, V]."""
        for sequence in sequences:
            if sequence not in self._rows:
                self._start(sequence, logits)
        assert self._table is not None
        counts = self._table[self._index(sequences)]
        return counts > 0, (counts // 2).to(logits.dtype)

    def add(self, sequences: list[Sequence], token_ids: Tensor) -> None:
        """Count one more token of each sequence, int64 [n]; `of` must have been asked about them."""
        if sequences:
            assert self._table is not None
            self._table[self._index(sequences), token_ids] += 2

    def _index(self, sequences: list[Sequence]) -> Tensor:
        assert self._table is not None
        return to_device([self._rows[sequence] for sequence in sequences], self._table.device)

    def _start(self, sequence: Sequence, logits: Tensor) -> None:
        if not self._free:
            self._grow(logits)
        assert self._table is not None
        row = self._rows[sequence] = self._free.pop()
        weakref.finalize(sequence, self._free.append, row).atexit = False
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        counts = self._table[row].zero_()
        for token_ids, weight in ((sorted(set(prompt)), 1), (output, 2)):
            index = to_device(token_ids, logits.device)
            counts.index_add_(0, index, counts.new_full(index.shape, weight))

    def _grow(self, logits: Tensor) -> None:
        """Twice as many rows."""
        if self._table is None:
            shape = (0, logits.shape[1])
            self._table = torch.empty(shape, dtype=torch.int32, device=logits.device)
        rows = len(self._table)
        added = max(rows, _FEWEST_ROWS)
        self._table = pad(self._table, (0, 0, 0, added))
        self._free += range(rows, rows + added)
