"""Moving features towards the nearest of given centers, such as those of a k-means clustering."""

import numpy as np
import torch
import torch.nn.functional as F

from utils.files import load_tensors
from utils.misc import UserError


def squared_distances(points, centers, normalize=False):
    """points (..., D), centers (k, D) -> (..., k); of their directions alone with `normalize`."""
    if normalize:
        points, centers = F.normalize(points, dim=-1), F.normalize(centers, dim=-1)
    products = points @ centers.T
    norms = points.square().sum(dim=-1, keepdim=True) + centers.square().sum(dim=-1)
    return norms - 2 * products


def push_to_nearest(points, centers, degree, normalize=False, push_normalized=False):
    """Each point of (..., D) moved by the share `degree` of the way to the nearest of the centers.

    normalize: the nearest by direction; push_normalized: points and centers are scaled to unit
    length before they are moved, too.
    """
    nearest = squared_distances(points, centers, normalize).argmin(dim=-1)
    if push_normalized:
        points, centers = F.normalize(points, dim=-1), F.normalize(centers, dim=-1)
    return torch.lerp(points, centers[nearest], degree)


def read_centers(path, flag="--centerpushFile"):
    """Centers (k, D) from a .npy or .txt file, or a clustering checkpoint (`state_dict`, `Ck`).

    Raises UserError, naming the flag that gave the file, if it doesn't hold any.
    """
    try:
        if path.endswith(".npy"):
            centers = torch.from_numpy(np.load(path))
        elif path.endswith(".txt"):
            centers = torch.from_numpy(np.loadtxt(path, ndmin=2))
        else:
            centers = load_tensors(path)["state_dict"]["Ck"].squeeze(0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{flag} {path}: no centers in it ({error!r}); a .npy or .txt file of one "
            "center a row is needed, or a .pt with state_dict.Ck"
        ) from error
    if centers.dim() != 2:
        raise UserError(f"{flag} {path}: {tuple(centers.shape)} isn't a row per center")
    return centers.float()
