"""Which tokens a decode step computes beyond the next one, on the guess that the model will say them.

A step's guesses ride along in the pass that computes the next token: its logits at each of them tell what the model
itself says there. While a pass is bound by reading the weights, they cost little more than nothing. How many guesses
pay is decided from what was measured in this very process: how often guesses of their kind came true, and how long
steps of so many tokens took. Where none pays, as in large batches, none is made.

Two proposers: context lookup, and a recycle head, if there is one, where lookup has nothing to say or is less sure.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence as SequenceOf
from statistics import median
from typing import NamedTuple
from weakref import WeakKeyDictionary

from teco_kernels.decoder.gate import Gate
from teco_kernels.decoder.lookup import ContextLookup
from teco_kernels.decoder.scheduler import Sequence

_WINDOW = 15  # durations kept per size of a step
_FORGET_AFTER = 512  # steps; a size that was not seen for so long is tried again
_ALL_TRIED = 16  # tokens
_ALL_SIZES, _SIZE_STEP = 8, 4  # steps with guesses have any number of tokens up to the one, then multiples of the other
_MANY_SEQUENCES = 4  # from so many on, whether to guess at all is tried out
_NEXT_TRIED = 1.25  # times the largest size that is known
_KIND_MEMORY = 0.99  # see Share: guesses of one kind and depth, in all sequences
_SEQUENCE_MEMORY = 0.9  # all guesses for one sequence, some of which repeat themselves and some never do
_KIND_WEIGHT, _SEQUENCE_WEIGHT = 2.0, 4.0  # of what is believed before
_HOPED = 0.9  # share of guesses that come true where a text repeats itself
_TIE = 1.01  # gain below which a longer step is not worth its noise
_SURE = 0.85  # of its guess, that lookup must be for the head not to be asked
_HEAD_MEMORY, _HEAD_PRIOR, _HEAD_WEIGHT = 0.995, 0.3, 40.0  # share of runs of the head that gain a token
_HEAD_TRIAL = 64  # steps with a head before it is asked whether it pays
_HEAD_PAUSES = 64, 512  # steps without one that did not: at first, and at most after pauses that each doubled

# Kinds of guesses, beside 0 and the lengths of matches: lookup's which the head makes too, and the head's by tenths of
# the probability that it gives them.
_AGREED, _HEAD = 10, 100


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

    def add(self, came_true: float) -> None:
        """Note an observation; a number between 0 and 1 for the mean of several."""
        self._true = self._true * self._memory + came_true
        self._seen = self._seen * self._memory + 1

    def estimate(self, prior: float, weight: float) -> float:
        """The share, `prior` counting as so many observations."""
        return (self._true + prior * weight) / (self._seen + weight)


class _Said(NamedTuple):
    """What the head said would come after so many tokens of a sequence, and how probable it held it to be."""

    num_tokens: int
    token_id: int
    probability: float


class _Followed:
    """What is known of one sequence: its text, how its own guesses fared, and what the head has said last."""

    def __init__(self) -> None:
        self.lookup = ContextLookup()
        self.share = Share(_SEQUENCE_MEMORY)
        self.said = _Said(0, -1, 0.0)


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
    lookup, head : bool
        The proposers: context lookup, and a recycle head, whose words come by `hear`.
    verify : bool
        False: the head's word counts, whatever the model would say and whatever it costs; one a step.

    Attributes
    ----------
    num_guessed, num_accepted : int
        Tokens, over all steps.
    cost, head_cost, silent_cost : StepCost
        Of the model's steps, of runs of the head in which it speaks, and of others, by their numbers of rows.
    """

    def __init__(self, max_tokens: int = 4, *, lookup: bool = True, head: bool = False, verify: bool = True) -> None:
        self.max_tokens = max_tokens if verify else 1
        self.verify = verify
        self._looks_up, self._has_head = lookup and verify, head
        self.cost, self.head_cost, self.silent_cost = StepCost(), StepCost(), StepCost()
        self._gate = Gate()
        self._head_spoke, self._head_gain = Share(_HEAD_MEMORY), Share(_HEAD_MEMORY)
        self._head_guessed = self._head_gained = 0  # guesses of this step on the head's word, and those that came true
        self._head_steps = 0  # since it was last paused, below 0 until it is tried again
        self._head_pause = _HEAD_PAUSES[0]  # the next one's length
        self.num_guessed = self.num_accepted = 0
        self._followed: WeakKeyDictionary[Sequence, _Followed] = WeakKeyDictionary()
        self._shares: dict[tuple[int, int], Share] = {}  # by kind and depth

    def propose(self, sequences: SequenceOf[Sequence]) -> list[Guess]:
        """For each of the sequences that the next step decodes, as many guesses as pay; often none."""
        if not self.verify:
            return [self._word(sequence) for sequence in sequences]
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

    def _word(self, sequence: Sequence) -> Guess:
        """What the head has said, as long as the answer has room for a token."""
        said = self._follow(sequence).said
        fresh = said.num_tokens == len(sequence.token_ids) and said.token_id >= 0
        return Guess([said.token_id], _HEAD) if fresh and sequence.num_generated < sequence.max_tokens else NO_GUESS

    def _guess(self, sequence: Sequence) -> Guess:
        # The token after the last guess is the step's own gain, and must still be within the answer.
        count = max(min(self.max_tokens, sequence.max_tokens - sequence.num_generated - 1), 0)
        followed = self._follow(sequence)
        found = Guess(*followed.lookup.propose(sequence.token_ids, count)) if self._looks_up else NO_GUESS
        said = followed.said
        if said.num_tokens != len(sequence.token_ids) or said.token_id < 0 or not count:
            return found
        if found.token_ids[:1] == [said.token_id]:
            return Guess(found.token_ids, found.kind + _AGREED)
        kind = _HEAD + min(int(said.probability * 10), 9)
        if found.token_ids and self._estimate(found.kind, 0, followed) >= self._estimate(kind, 0, followed):
            return found
        rest: list[int] = []
        if self._looks_up and count > 1:
            rest, _ = followed.lookup.propose(sequence.token_ids, count - 1, [said.token_id])
        return Guess([said.token_id, *rest], kind)

    def _follow(self, sequence: Sequence) -> _Followed:
        if sequence not in self._followed:
            self._followed[sequence] = _Followed()
        return self._followed[sequence]

    def listens(self, num_sequences: int) -> bool:
        """Whether the head is to run after a step that decoded so many sequences; else what it knows gets holes."""
        if not self._has_head or not self.verify:
            return self._has_head
        return self._head_steps >= 0 and (not self.cost.knows(num_sequences) or self._may_pay(num_sequences))

    def is_sure(self, sequence: Sequence) -> bool:
        """Whether lookup has a guess for a sequence that the head need not be asked about."""
        if not self._looks_up:
            return False
        found, length = self._follow(sequence).lookup.propose(sequence.token_ids, 1)
        return bool(found) and self._estimate(length, 0, self._follow(sequence)) >= _SURE

    def hear(self, sequence: Sequence, token_id: int, probability: float) -> None:
        """Note what the head says will come after a sequence; -1 for nothing."""
        self._follow(sequence).said = _Said(len(sequence.token_ids), token_id, probability)

    def _probabilities(self, guess: Guess, sequence: Sequence) -> list[float]:
        """Of each guess to come true together with those before it: they fall, so the best ones are a beginning."""
        followed, joint, probabilities = self._follow(sequence), 1.0, []
        for depth in range(len(guess.token_ids)):
            joint *= self._estimate(guess.kind, depth, followed)
            probabilities.append(joint)
        return probabilities

    def _estimate(self, kind: int, depth: int, followed: _Followed) -> float:
        """Of a guess to come true once those before it have."""
        believed = self._believed(kind, depth)
        if kind >= _HEAD and not depth:
            return believed
        return followed.share.estimate(believed, _SEQUENCE_WEIGHT)

    def _believed(self, kind: int, depth: int) -> float:
        """How often guesses of a kind come true. A head that is well trained knows that before it is measured."""
        prior = (kind - _HEAD + 0.5) / 10 if kind >= _HEAD and not depth else 0.5
        return self._share(kind, depth).estimate(prior, _KIND_WEIGHT)

    def _share(self, kind: int, depth: int) -> Share:
        if (kind, depth) not in self._shares:
            self._shares[kind, depth] = Share(_KIND_MEMORY)
        return self._shares[kind, depth]

    def _may_pay(self, num_sequences: int) -> bool:
        """Whether guesses would pay if nearly all came true: else it saves looking for them."""
        if num_sequences >= _MANY_SEQUENCES and not self._gate.is_open:
            return False
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
            # Each size of a step is recorded once: of large ones, some are enough.
            if num_sequences + count > _ALL_SIZES and (num_sequences + count) % _SIZE_STEP:
                continue
            rate = gain / self.cost(num_sequences + count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def end_step(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """Note what a replayed step of so many sequences took in all, and how many tokens came of it."""
        if num_sequences >= _MANY_SEQUENCES:
            self._gate.add(num_sequences, num_tokens, seconds)
        if self._has_head and self.verify:
            self._judge_head(num_sequences)

    def _judge_head(self, num_sequences: int) -> None:
        """Pause the head when what it gains is less than what its runs, and the rows of its guesses, cost."""
        self._head_steps += 1
        guessed, gained = self._head_guessed / num_sequences, self._head_gained / num_sequences
        self._head_guessed = self._head_gained = 0
        if self._head_steps <= 0:
            return
        self._head_spoke.add(guessed)
        self._head_gain.add(gained)
        if self._head_steps > _HEAD_TRIAL and self.head_cost.knows(num_sequences):
            if self._head_pays(num_sequences, 0.0):  # by what it does alone, not by what it was believed to do
                self._head_pause = _HEAD_PAUSES[0]
            elif not self._head_pays(num_sequences, _HEAD_WEIGHT):
                self._head_steps = -self._head_pause
                self._head_pause = min(2 * self._head_pause, _HEAD_PAUSES[1])
                self._head_spoke, self._head_gain = Share(_HEAD_MEMORY), Share(_HEAD_MEMORY)

    def _head_pays(self, num_sequences: int, prior_weight: float) -> bool:
        """Whether a step gains more by the head's word than its runs, and the rows of its guesses, cost."""
        step = self.cost(num_sequences)
        row = max(self.cost(num_sequences + 1) - step, 0.0)
        guesses = self._head_spoke.estimate(_HEAD_PRIOR, prior_weight) * num_sequences
        gain = self._head_gain.estimate(_HEAD_PRIOR, prior_weight) * step - guesses * row
        return gain >= self.head_cost(num_sequences)

    def learn(self, sequence: Sequence, guess: Guess, num_accepted: int, num_checked: int) -> None:
        """Note how many of a sequence's guesses were compared with what the model says, and how many it says itself."""
        self.num_guessed += len(guess.token_ids)
        self.num_accepted += num_accepted
        self._head_guessed += guess.kind >= _HEAD
        self._head_gained += guess.kind >= _HEAD and num_accepted > 0
        for depth in range(num_checked):
            shares = [self._share(guess.kind, depth)]
            # The head knows by itself how sure it is; what a sequence is like says more about what lookup finds.
            if guess.kind < _HEAD or depth:
                shares.append(self._follow(sequence).share)
            for share in shares:
                share.add(depth < num_accepted)
