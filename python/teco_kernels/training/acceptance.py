"""How often a proposer says what the base model says next: the head, context lookup, and lookup else the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from teco_kernels.decoder.lookup import ContextLookup
from teco_kernels.training.head import Base, RecycleHead
from teco_kernels.training.recording import Recording


@dataclass
class Acceptance:
    """Counts over the places of answers where a second token is due.

    Attributes
    ----------
    places : int
    head, lookup, either : int
        Where the proposer was right; `either` is lookup where it has a match, else the head.
    matches : int
        Where lookup has a match.
    head_elsewhere : int
        Where it has none and the head was right.
    known : int
        Where the model's token is in the draft vocabulary.
    """

    places: int = 0
    head: int = 0
    lookup: int = 0
    either: int = 0
    matches: int = 0
    head_elsewhere: int = 0
    known: int = 0

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def shares(self) -> dict[str, float]:
        """Of all places; `head_elsewhere` of those without a match."""
        shares = {name: value / max(self.places, 1) for name, value in vars(self).items() if name != "places"}
        shares["head_elsewhere"] = self.head_elsewhere / max(self.places - self.matches, 1)
        return shares


@torch.no_grad()
def acceptance(head: RecycleHead, vocabulary: Tensor | None, base: Base, recordings: Sequence[Recording]) -> Acceptance:
    """Over all places of the recorded answers, each as if it were reached.

    Parameters
    ----------
    head : RecycleHead
    vocabulary : Tensor or None
        int64: the tokens that it can say; None for all.
    base : Base
    recordings : sequence of Recording
        Of texts written greedily; of sampled ones, the model's likeliest token counts as what it says.
    """
    rows = base.rows if vocabulary is None else base.rows[vocabulary]
    was_training = head.training
    head.eval()
    total = Acceptance()
    for recording in recordings:
        for ids, greedy, hidden, num_prompt in recording.sequences():
            first = max(num_prompt - 1, 0)  # where the answer has its first token
            if len(ids) - 1 <= first:
                continue
            out = head(F.embedding(ids[1:], base.embedding), hidden[:-1].float(), [len(ids) - 1])
            said = (out[first:] @ rows.t()).argmax(-1)
            said = said if vocabulary is None else vocabulary[said]
            wanted = greedy[1 + first :].long()
            found = _looked_up(ids.tolist(), first + 2)
            matches, head_right, lookup_right = found >= 0, said == wanted, found == wanted
            known = torch.ones(len(wanted)) if vocabulary is None else torch.isin(wanted, vocabulary)
            total += Acceptance(
                places=len(wanted),
                head=int(head_right.sum()),
                lookup=int(lookup_right.sum()),
                either=int(torch.where(matches, lookup_right, head_right).sum()),
                matches=int(matches.sum()),
                head_elsewhere=int((head_right & ~matches).sum()),
                known=int(known.sum()),
            )
    head.train(was_training)
    return total


def _looked_up(token_ids: list[int], first: int) -> Tensor:
    """What lookup proposes after `first` tokens, after one more, and so on to the end; -1 where it has no match."""
    lookup = ContextLookup()
    proposed = (lookup.propose(token_ids[:end], 1)[0] for end in range(first, len(token_ids) + 1))
    return torch.tensor([found[0] if found else -1 for found in proposed])
