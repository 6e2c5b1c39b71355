"""Whether guessing gains in large batches: found by doing without it and with it in turns."""

from __future__ import annotations

import math

_STRETCH, _STRETCHES = 4, 4  # steps of a stretch, and stretches of a trial: without, with, without, with
_KEPT = 96  # steps that a verdict holds
_GAIN = math.log(1.03)  # below it is noise
_LIKE = 0.25  # batches whose sizes differ by no more than this share are alike
_MEMORY = 0.5  # what earlier trials weigh


class Gate:
    """Compares tokens per second of some steps without guesses and of some with them, now and then.

    A step of many tokens is bound by arithmetic: one more costs nearly what it is worth, and which of the two is more
    cannot be told from single steps, whose times vary by more than that beside other work. Neighbouring stretches of
    steps can be compared whatever else goes on.

    Attributes
    ----------
    is_open : bool
        Whether the next step is to be one with guesses.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._left = _STRETCH
        self._stretches = _STRETCHES  # left in the trial, this one included; 0 while a verdict holds
        self._log_gain = 0.0
        self._tokens, self._seconds = [0, 0], [0.0, 0.0]  # of the trial: without, with
        self._num_sequences = 0  # when the trial, or the verdict, began

    def add(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """Note the tokens that a step of so many sequences has given, and its duration."""
        if abs(num_sequences - self._num_sequences) > self._num_sequences * _LIKE:
            # What holds for one batch need not for another, and no two stretches of a trial may differ by theirs.
            self._begin_trial(num_sequences)
        self._tokens[self.is_open] += num_tokens
        self._seconds[self.is_open] += seconds
        self._left -= 1
        if self._left:
            return
        if not self._stretches:
            self._begin_trial(num_sequences)
        elif self._stretches > 1:
            self.is_open, self._left, self._stretches = not self.is_open, _STRETCH, self._stretches - 1
        else:
            without, with_guesses = (tokens / time for tokens, time in zip(self._tokens, self._seconds, strict=True))
            self._log_gain += (1 - _MEMORY) * (math.log(with_guesses / without) - self._log_gain)
            self.is_open, self._left, self._stretches = self._log_gain > _GAIN, _KEPT, 0

    def _begin_trial(self, num_sequences: int) -> None:
        self.is_open, self._left, self._stretches = False, _STRETCH, _STRETCHES
        self._tokens, self._seconds = [0, 0], [0.0, 0.0]
        self._num_sequences = num_sequences
