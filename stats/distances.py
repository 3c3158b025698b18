"""Distances between consecutive frames."""

import torch

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
    product = (frames[:, 1:] * frames[:, :-1]).sum(-1)
    if metric in ("cosine", "coscorr"):
        norms = torch.linalg.vector_norm(frames, dim=-1)
        cosine = product / (norms[:, 1:] * norms[:, :-1])
        return 1 - cosine if metric == "cosine" else cosine.abs()
    squares = frames.square().sum(-1)
    squared_distance = squares[:, 1:] + squares[:, :-1] - 2 * product
    return squared_distance if metric == "euclidsq" else squared_distance.sqrt()
