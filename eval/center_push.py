"""Moving features towards the nearest of given centers, such as those of k-means clusters."""

import numpy as np
import torch
import torch.nn.functional as F

from utils.files import load_array, load_tensors
from utils.kmeans import squared_distances
from utils.misc import UserError


def push_to_nearest(points, centers, degree, normalize=False, push_normalized=False):
    """Move each point of (..., D) a fraction `degree` of the way to its nearest center.

    normalize: find the nearest by direction; push_normalized: also scale points and centers to unit
    length before the move.
    """
    nearest = squared_distances(points, centers, normalize).argmin(dim=-1)
    if push_normalized:
        points, centers = F.normalize(points, dim=-1), F.normalize(centers, dim=-1)
    return torch.lerp(points, centers[nearest], degree)


def read_centers(path, flag="--centerpushFile"):
    """Centers (k, D) from a .npy or .txt file, or a clustering checkpoint (`state_dict`, `Ck`).

    Raises UserError, naming `flag` and the file, if it holds no centers.
    """
    try:
        if path.endswith(".npy"):
            centers = torch.from_numpy(load_array(path))
        elif path.endswith(".txt"):
            centers = torch.from_numpy(np.loadtxt(path, ndmin=2))
        else:
            centers = load_tensors(path)["state_dict"]["Ck"].squeeze(0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{flag} {path}: holds no centers ({error!r}); give a .npy or .txt file with one "
            "center per row, or a .pt with state_dict.Ck"
        ) from error
    if centers.dim() != 2:
        raise UserError(f"{flag} {path}: shape {tuple(centers.shape)} isn't one row per center")
    return centers.float()
