"""Distances between consecutive frames."""

from utils.peaks import neighbour_cosines

# Name -> whether a larger value means a larger difference.
METRICS = {"cosine": True, "euclid": True, "euclidsq": True, "coscorr": False}


def frame_distances(frames, metric):
    """Compare consecutive frames: `frames` (B, S, D) -> (B, S - 1) float32.

    cosine    1 - cos(u, v)
    coscorr   |cos(u, v)|
    euclidsq  |u|^2 + |v|^2 - 2 u.v    (rounding can leave it slightly below zero)
    euclid    square root of that

    NaN where undefined: the cosine of a frame of zeros, the root of a negative number.
    """
    frames = frames.float()
    if metric in ("cosine", "coscorr"):
        cosine = neighbour_cosines(frames)
        return 1 - cosine if metric == "cosine" else cosine.abs()
    product = (frames[:, 1:] * frames[:, :-1]).sum(-1)
    squares = frames.square().sum(-1)
    squared_distance = squares[:, 1:] + squares[:, :-1] - 2 * product
    return squared_distance if metric == "euclidsq" else squared_distance.sqrt()
