"""Which tokens a decode step computes beyond the next one, on the guess that the model will say them.

A step's guesses ride along in the pass that computes the next token: its logits at each of them tell what the model
itself says there. While a pass is bound by reading the weights, they cost little more than nothing. How many guesses
pay is decided from what was measured in this very process: how often guesses of their kind came true, and how long
steps of so many tokens took. Where none pays, as in large batches, none is made.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence as SequenceOf
from statistics import median
from typing import NamedTuple
from weakref import WeakKeyDictionary

from teco_kernels.decoder.lookup import ContextLookup
from teco_kernels.decoder.scheduler import Sequence

_WINDOW = 15  # durations kept per size of a step
_FORGET_AFTER = 512  # steps; a size that was not seen for so long is tried again
_ALL_TRIED = 16  # tokens
_MEMORY = 0.99  # of the counts of guesses, per guess: the last hundred or so decide
_TIE = 1.01  # gain below which a longer step is not worth its noise


class Guess(NamedTuple):
    """Tokens that may follow a sequence, and the kind of evidence for them."""

    token_ids: list[int]
    kind: int


class StepCost:
    """Durations of decode steps by their number of tokens."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._last_seen: dict[int, int] = {}
        self._num_steps = 0
        self._sizes: list[int] = []  # in order
        self._median: dict[int, float] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        """Note a step's duration."""
        self._num_steps += 1
        if num_tokens not in self._seconds:
            self._seconds[num_tokens] = deque(maxlen=_WINDOW)
            insort(self._sizes, num_tokens)
        self._seconds[num_tokens].append(seconds)
        self._median[num_tokens] = median(self._seconds[num_tokens])
        self._last_seen[num_tokens] = self._num_steps
        for old in [size for size, seen in self._last_seen.items() if self._num_steps - seen > _FORGET_AFTER]:
            del self._seconds[old], self._last_seen[old], self._median[old]
            self._sizes.remove(old)

    def __contains__(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens have been measured."""
        return num_tokens in self._seconds

    def __call__(self, num_tokens: int) -> float:
        """Seconds that a step takes: the median, or where none is known, what is known of smaller steps.

        What is not known is thereby held to be cheap, and gets tried; but from `_ALL_TRIED` tokens on, sizes are too
        many for that, and one between two that are known lies between them.
        """
        if not self._sizes:
            return 1.0
        place = bisect_right(self._sizes, num_tokens)
        lower = self._sizes[max(place - 1, 0)]
        seconds = self._median[lower]
        if lower < num_tokens and num_tokens >= _ALL_TRIED and place < len(self._sizes):
            upper = self._sizes[place]
            seconds += (self._median[upper] - seconds) * (num_tokens - lower) / (upper - lower)
        return seconds


class Recycler:
    """Makes guesses for decoding sequences, and learns from what became of them.

    Parameters
    ----------
    max_tokens : int
        Most guesses for one sequence in a step.

    Attributes
    ----------
    num_guessed, num_accepted : int
        Tokens, over all steps.
    """

    def __init__(self, max_tokens: int = 4) -> None:
        self.max_tokens = max_tokens
        self.cost = StepCost()
        self.num_guessed = self.num_accepted = 0
        self._lookups: WeakKeyDictionary[Sequence, ContextLookup] = WeakKeyDictionary()
        self._outcomes: dict[tuple[int, int], tuple[float, float]] = {}  # (kind, depth): came true, were looked at

    def propose(self, sequences: SequenceOf[Sequence]) -> list[Guess]:
        """For each of the sequences that the next step decodes, as many guesses as pay; often none."""
        guesses = [self._guess(sequence) for sequence in sequences]
        candidates = sorted(
            (-probability, depth, row)
            for row, guess in enumerate(guesses)
            for depth, probability in enumerate(self._probabilities(guess))
        )
        taken = self._how_many([-candidate[0] for candidate in candidates], len(sequences))
        counts = [0] * len(sequences)
        for _, _, row in candidates[:taken]:
            counts[row] += 1
        return [Guess(guess.token_ids[:count], guess.kind) for guess, count in zip(guesses, counts, strict=True)]

    def _guess(self, sequence: Sequence) -> Guess:
        # The token after the last guess is the step's own gain, and must still be within the answer.
        count = min(self.max_tokens, sequence.max_tokens - sequence.num_generated - 1)
        lookup = self._lookups.setdefault(sequence, ContextLookup())
        return Guess(*lookup.propose(sequence.token_ids, max(count, 0)))

    def _probabilities(self, guess: Guess) -> list[float]:
        """Of each guess to come true together with those before it: they fall, so the best ones are a beginning."""
        joint, probabilities = 1.0, []
        for depth in range(len(guess.token_ids)):
            came_true, seen = self._outcomes.get((guess.kind, depth), (0.0, 0.0))
            joint *= (came_true + 1) / (seen + 2)
            probabilities.append(joint)
        return probabilities

    def _how_many(self, probabilities: list[float], num_sequences: int) -> int:
        """The number of guesses, likeliest first, that gives most tokens per second."""
        if num_sequences not in self.cost:  # what guesses are compared with
            return 0
        best, best_rate, gain = 0, num_sequences / self.cost(num_sequences) * _TIE, float(num_sequences)
        for count, probability in enumerate(probabilities, start=1):
            gain += probability
            rate = gain / self.cost(num_sequences + count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def learn(self, guess: Guess, num_accepted: int, num_checked: int) -> None:
        """Note how many of a sequence's guesses were compared with what the model says, and how many it says itself."""
        self.num_guessed += len(guess.token_ids)
        self.num_accepted += num_accepted
        for depth in range(num_checked):
            came_true, seen = self._outcomes.get((guess.kind, depth), (0.0, 0.0))
            self._outcomes[guess.kind, depth] = (
                came_true * _MEMORY + (depth < num_accepted),
                seen * _MEMORY + 1,
            )
