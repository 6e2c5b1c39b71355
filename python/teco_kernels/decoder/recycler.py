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
_NEXT_TRIED = 1.25  # times the largest size that is known
_KIND_MEMORY = 0.99  # see Share: guesses of one kind and depth, in all sequences
_SEQUENCE_MEMORY = 0.9  # all guesses for one sequence, some of which repeat themselves and some never do
_KIND_WEIGHT, _SEQUENCE_WEIGHT = 2.0, 4.0  # of what is believed before
_HOPED = 0.9  # share of guesses that come true where a text repeats itself
_TIE = 1.01  # gain below which a longer step is not worth its noise


class Guess(NamedTuple):
    """Tokens that may follow a sequence, and the kind of evidence for them."""

    token_ids: list[int]
    kind: int


NO_GUESS = Guess([], 0)


class Share:
    """How often something comes true, of late.

    Parameters
    ----------
    memory : float
        What an observation weighs after the next one; about ``1 / (1 - memory)`` of them count.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._true = self._seen = 0.0

    def add(self, came_true: bool) -> None:
        """Note an observation."""
        self._true = self._true * self._memory + came_true
        self._seen = self._seen * self._memory + 1

    def estimate(self, prior: float, weight: float) -> float:
        """The share, `prior` counting as so many observations."""
        return (self._true + prior * weight) / (self._seen + weight)


class _Followed:
    """What is known of one sequence: its text, and how its own guesses fared."""

    def __init__(self) -> None:
        self.lookup = ContextLookup()
        self.share = Share(_SEQUENCE_MEMORY)


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

    def knows(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens have been measured, or smaller and larger ones, where sizes are many."""
        between = bool(self._sizes) and self._sizes[0] < num_tokens < self._sizes[-1]
        return num_tokens in self._seconds or (between and num_tokens >= _ALL_TRIED)

    def __call__(self, num_tokens: int) -> float:
        """Seconds that a step takes: the median, or where none is known, what is known of the next smaller size.

        What is not known is thereby held to be cheap, and gets tried. From `_ALL_TRIED` tokens on, sizes are too many
        for that, and lie on the line through two that are known; while one alone is, those just beyond it are cheap.
        """
        if not self._sizes:
            return 1.0
        place = bisect_right(self._sizes, num_tokens)
        lower = self._sizes[max(place - 1, 0)]
        seconds = self._median[lower]
        if lower >= num_tokens or num_tokens < _ALL_TRIED:
            return seconds
        if len(self._sizes) == 1:
            return seconds if num_tokens <= lower * _NEXT_TRIED else seconds * num_tokens / lower
        other = self._sizes[place if place < len(self._sizes) else place - 2]
        slope = (self._median[other] - seconds) / (other - lower)
        return seconds + max(slope, 0.0) * (num_tokens - lower)


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
        self._followed: WeakKeyDictionary[Sequence, _Followed] = WeakKeyDictionary()
        self._shares: dict[tuple[int, int], Share] = {}  # by kind and depth

    def propose(self, sequences: SequenceOf[Sequence]) -> list[Guess]:
        """For each of the sequences that the next step decodes, as many guesses as pay; often none."""
        if not self._may_pay(len(sequences)):
            return [NO_GUESS] * len(sequences)
        guesses = [self._guess(sequence) for sequence in sequences]
        candidates = sorted(
            (-probability, depth, row)
            for row, guess in enumerate(guesses)
            for depth, probability in enumerate(self._probabilities(guess, sequences[row]))
        )
        taken = self._how_many([-candidate[0] for candidate in candidates], len(sequences))
        counts = [0] * len(sequences)
        for _, _, row in candidates[:taken]:
            counts[row] += 1
        return [Guess(guess.token_ids[:count], guess.kind) for guess, count in zip(guesses, counts, strict=True)]

    def _guess(self, sequence: Sequence) -> Guess:
        # The token after the last guess is the step's own gain, and must still be within the answer.
        count = min(self.max_tokens, sequence.max_tokens - sequence.num_generated - 1)
        if sequence not in self._followed:
            self._followed[sequence] = _Followed()
        return Guess(*self._followed[sequence].lookup.propose(sequence.token_ids, max(count, 0)))

    def _probabilities(self, guess: Guess, sequence: Sequence) -> list[float]:
        """Of each guess to come true together with those before it: they fall, so the best ones are a beginning."""
        share, joint, probabilities = self._followed[sequence].share, 1.0, []
        for depth in range(len(guess.token_ids)):
            joint *= share.estimate(self._share(guess.kind, depth).estimate(0.5, _KIND_WEIGHT), _SEQUENCE_WEIGHT)
            probabilities.append(joint)
        return probabilities

    def _share(self, kind: int, depth: int) -> Share:
        if (kind, depth) not in self._shares:
            self._shares[kind, depth] = Share(_KIND_MEMORY)
        return self._shares[kind, depth]

    def _may_pay(self, num_sequences: int) -> bool:
        """Whether guesses would pay if nearly all came true: else it saves looking for them."""
        if not self.cost.knows(num_sequences):  # what guesses are compared with
            return False
        plain = self.cost(num_sequences) / num_sequences * _TIE
        stride = max(num_sequences // 4, 1)
        counts = range(stride, num_sequences * self.max_tokens + 1, stride)
        return any(self.cost(num_sequences + count) < plain * (num_sequences + _HOPED * count) for count in counts)

    def _how_many(self, probabilities: list[float], num_sequences: int) -> int:
        """The number of guesses, likeliest first, that gives most tokens per second."""
        best, best_rate, gain = 0, num_sequences / self.cost(num_sequences) * _TIE, float(num_sequences)
        for count, probability in enumerate(probabilities, start=1):
            gain += probability
            rate = gain / self.cost(num_sequences + count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def learn(self, sequence: Sequence, guess: Guess, num_accepted: int, num_checked: int) -> None:
        """Note how many of a sequence's guesses were compared with what the model says, and how many it says itself."""
        self.num_guessed += len(guess.token_ids)
        self.num_accepted += num_accepted
        for depth in range(num_checked):
            for share in (self._share(guess.kind, depth), self._followed[sequence].share):
                share.add(depth < num_accepted)
