"""Context lookup: what followed the last time a sequence said what it says now."""

from __future__ import annotations

from collections.abc import Sequence

#: Lengths of the runs of tokens that are looked up; a longer match says more about what follows.
MATCH_LENGTHS = (4, 3, 2)


class ContextLookup:
    """Index of a growing sequence: each of its runs of `MATCH_LENGTHS` tokens, and where the latest one ended.

    Costs no model and no memory traffic to speak of: a few dictionary entries per token.
    """

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, token_ids: Sequence[int], count: int, after: Sequence[int] = ()) -> tuple[list[int], int]:
        """Tokens that may follow.

        Parameters
        ----------
        token_ids : sequence of int
            The sequence, grown at its end since the last call or the same.
        count : int
            Tokens wanted.
        after : sequence of int
            Tokens that the sequence may go on with; what is looked up is the text with these at its end.

        Returns
        -------
        list of int
            `count` tokens, or none where nothing matches. A continuation that reaches the sequence's end goes on with
            itself, as a text does that repeats.
        int
            Length of the match.
        """
        self._index(token_ids)
        size = len(token_ids)
        end = [*token_ids[-MATCH_LENGTHS[0] :], *after]
        for length in MATCH_LENGTHS:
            start = self._end_of.get(tuple(end[-length:])) if len(end) >= length else None
            if start is not None:
                beyond = list(after)  # the text's end, and what it goes on with
                for place in range(start, start + count):
                    beyond.append(token_ids[place] if place < size else beyond[place - size])
                return beyond[len(after) :], length
        return [], 0

    def _index(self, token_ids: Sequence[int]) -> None:
        """Enter the runs that end before the last token: only of those is it known what follows."""
        for end in range(max(self._num_indexed, min(MATCH_LENGTHS)), len(token_ids)):
            for length in MATCH_LENGTHS:
                if end >= length:
                    self._end_of[tuple(token_ids[end - length : end])] = end
        self._num_indexed = len(token_ids)
