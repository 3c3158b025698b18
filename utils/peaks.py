"""Change in representations: the distance of neighbouring frames, and its prominent peaks."""

import math

import torch
import torch.nn.functional as F


def neighbour_cosines(frames):
    """The cosine of each frame and the next, (B, S, D) -> (B, S - 1); NaN at frames of zeros."""
    product = (frames[:, 1:] * frames[:, :-1]).sum(-1)
    norms = torch.linalg.vector_norm(frames, dim=-1)
    return product / (norms[:, 1:] * norms[:, :-1])


def scaled_to_one(curves):
    """Each row of `curves` (B, N) shifted and scaled to span 0..1; NaN becomes 0."""
    curves = curves.nan_to_num(nan=0.0)
    lowest, highest = curves.aminmax(dim=-1, keepdim=True)
    return (curves - lowest) / (highest - lowest).clamp_min(torch.finfo(curves.dtype).tiny)


def peak_prominence(curves):
    """The prominence of each point of `curves` (B, N): (B, N), 0 if it isn't a peak.

    Go left from a peak to the next point that is as high, and right to the next higher one (or to
    the ends); the prominence is its height above the higher of the lowest points on either side.
    Time and memory: O(N log N) for each curve.
    """
    right = _lowest_before_higher(curves, torch.le)
    left = _lowest_before_higher(curves.flip(-1), torch.lt).flip(-1)
    return curves - torch.maximum(left, right)


def _lowest_before_higher(curves, passes):
    """The lowest value from each point rightwards, up to the first that fails `passes`.

    Every point moves by the longest span of 2^k points that all pass, then by the next shorter
    one, and so on.
    """
    spans = [1 << k for k in range(curves.shape[-1].bit_length())]
    highest = [F.pad(curves, (0, 1), value=math.inf)]  # [k]: in the span from each point
    lowest = highest[:1]
    for span in spans[:-1]:
        high, low = (F.pad(v[-1][..., span:], (0, span), value=math.inf) for v in (highest, lowest))
        highest.append(torch.maximum(highest[-1], high))
        lowest.append(torch.minimum(lowest[-1], low))
    at = torch.arange(1, curves.shape[-1] + 1, device=curves.device).expand(curves.shape)
    found = curves
    for span, high, low in reversed(list(zip(spans, highest, lowest, strict=True))):
        moves = passes(high.gather(-1, at), curves)
        found = torch.where(moves, torch.minimum(found, low.gather(-1, at)), found)
        at = at + span * moves
    return found
