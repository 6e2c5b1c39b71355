"""What the float64 references share."""

from __future__ import annotations

import torch


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; infinite when NaNs or infinities do not stand in the same places.

    Equal infinities agree; a reference of zeros asks for zeros.
    """
    out64, ref64 = out.detach().double(), reference.detach().double()
    if out64.shape != ref64.shape or not torch.equal(out64.isfinite(), ref64.isfinite()) or ref64.isnan().any():
        return float("inf")
    finite = ref64.isfinite()
    if not torch.equal(out64[~finite], ref64[~finite]):
        return float("inf")
    error, norm = (out64 - ref64)[finite].norm().item(), ref64[finite].norm().item()
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))
