"""From committed steps to what a client sees: the state of a request's texts and scores."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from qserve.engine.request import FinishReason, RequestOutput, SequenceOutput, TokenLogprob
from qserve.engine.sequence import Sequence, SequenceStatus
from qserve.engine.text import TextDelta, TextStream


@dataclass
class RequestState:
    """A request under way. prompt_logprobs: by position, as chunks of the prompt are computed."""

    sequences: list[Sequence]
    streams: list[TextStream]
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    @classmethod
    def start(cls, sequences: list[Sequence], tokenizer: PreTrainedTokenizerBase) -> RequestState:
        params = sequences[0].params
        streams = [
            TextStream(tokenizer, params.stop, params.min_tokens, params.skip_special_tokens)
            for _ in sequences
        ]
        return cls(sequences, streams)

    @property
    def finished(self) -> bool:
        return all(s.status is SequenceStatus.FINISHED for s in self.sequences)

    @property
    def num_cached_tokens(self) -> int:
        return self.sequences[0].num_cached_tokens or 0

    def advance(self, sequence: Sequence, logprob: TokenLogprob | None) -> SequenceOutput:
        """What the token that was just committed to `sequence` adds to its text."""
        token_id = sequence.token_ids[-1]
        delta = self._advance_text(sequence, token_id)
        reason = FinishReason.STOP if delta.stop else sequence.finish_reason
        return SequenceOutput(
            index=sequence.index,
            text=delta.text,
            token_ids=(token_id,),
            logprobs=None if logprob is None else (logprob,),
            finish_reason=reason,
            stop_reason=delta.stop or sequence.stop_reason,
        )

    def output(self, outputs: list[SequenceOutput]) -> RequestOutput:
        """The request's share of a step.

        The prompt's scores go with the first sequence's first token.
        """
        first = self.sequences[0]
        return RequestOutput(
            request_id=first.request_id,
            prompt_tokens=first.num_prompt_tokens,
            cached_tokens=self.num_cached_tokens,
            outputs=tuple(outputs),
            finished=self.finished,
            prompt_logprobs=self._prompt_scores(outputs),
        )

    def _advance_text(self, sequence: Sequence, token_id: int) -> TextDelta:
        """A token that ends the sequence is not part of its text."""
        stream = self.streams[sequence.index]
        if sequence.finish_reason is FinishReason.STOP:
            return stream.flush()
        delta = stream.feed(token_id)
        if delta.stop or sequence.finish_reason is None:
            return delta
        rest = stream.flush()
        return TextDelta(delta.text + rest.text, rest.stop)

    def _prompt_scores(
        self, outputs: list[SequenceOutput]
    ) -> tuple[TokenLogprob | None, ...] | None:
        first = self.sequences[0]
        if first.params.prompt_logprobs is None:
            return None
        is_first_token = outputs[0].index == 0 and first.num_output_tokens == 1
        positions = range(first.num_prompt_tokens)
        return tuple(map(self.prompt_logprobs.get, positions)) if is_first_token else None
