"""One answer as it grows: its text, its log-probabilities, and whether it has ended."""

from __future__ import annotations

from teco_kernels.decoder.sampling_params import CompletionOutput, Logprob, SamplingParams
from teco_kernels.decoder.scheduler import Sequence
from teco_kernels.decoder.tokenizer import Detokenizer, Tokenizer

_CONTEXT = 5  # prompt tokens that the detokeniser sees: the first word's space may depend on them


class Answer:
    """Follows the tokens of one sequence.

    Parameters
    ----------
    index : int
        Which of the request's answers.
    sequence : Sequence
        Grows with every `push`.
    params : SamplingParams
    tokenizer : Tokenizer
    """

    def __init__(self, index: int, sequence: Sequence, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        self.params = params
        self.output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        self._eos_token_ids = () if params.ignore_eos else tokenizer.eos_token_ids
        #: Tokens that would end the answer.
        self.stop_token_ids = frozenset((*self._eos_token_ids, *(params.stop_token_ids or ())))
        self._pending = ""  # text that may still become part of a stop string
        self._detokenizer = Detokenizer(
            tokenizer, context=sequence.token_ids[-_CONTEXT:], skip_special_tokens=params.skip_special_tokens
        )

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def push(self, token_id: int, logprobs: dict[int, Logprob] | None = None) -> None:
        """Add a token; `finished` may become true."""
        output = self.output
        self.sequence.token_ids.append(token_id)
        output.token_ids.append(token_id)
        if output.logprobs is not None and logprobs is not None:
            output.logprobs.append(logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs[token_id].logprob
        is_stop_token = token_id in self.stop_token_ids
        if not is_stop_token or self.params.include_stop_str_in_output:
            self._pending += self._detokenizer.push([token_id])
        is_last = is_stop_token or len(output.token_ids) >= self.sequence.max_tokens
        if is_last:
            self._pending += self._detokenizer.pending()
        if self._cut_at_stop_string():
            self.finish("stop")
        elif is_stop_token:
            output.stop_reason = None if token_id in self._eos_token_ids else token_id
            self.finish("stop")
        elif is_last:
            self.finish("length")
        else:
            self._emit(len(self._pending) - self._held_back())

    def finish(self, reason: str, error: str | None = None) -> None:
        """End the answer; text that may have become a stop string comes out."""
        self._emit(len(self._pending))
        self.output.finish_reason, self.output.error = reason, error

    def _cut_at_stop_string(self) -> bool:
        """Cut the pending text at the first stop string in it. What was emitted before cannot be part of one."""
        if len(self.output.token_ids) < self.params.min_tokens:
            return False
        found = [(self._pending.find(stop), stop) for stop in self.params.stop_strings if stop in self._pending]
        if not found:
            return False
        position, stop = min(found)
        self.output.stop_reason = stop
        self._pending = self._pending[: position + (len(stop) if self.params.include_stop_str_in_output else 0)]
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the pending text with which a stop string begins."""
        longest = 0
        for stop in self.params.stop_strings:
            for length in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _emit(self, count: int) -> None:
        piece, self._pending = self._pending[:count], self._pending[count:]
        self.output.text += piece
        self.output.new_text += piece
