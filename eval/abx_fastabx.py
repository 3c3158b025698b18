"""The same ABX task computed by the fastabx library, as a check or for its speed.

https://pypi.org/project/fastabx, for Python 3.12 and later. It is given the same items, groups and
cells, so that its errors equal those of `eval.abx_groups.cell_errors`.
"""

import importlib.metadata
import sys

import torch

from utils.misc import UserError

METRICS = {"cosine": "angular", "euclidean": "euclidean"}


def require_fastabx():
    """Name and version of the library. Raises UserError, with what to do, if it is missing."""
    try:
        return f"fastabx {importlib.metadata.version('fastabx')}"
    except importlib.metadata.PackageNotFoundError:
        python = ".".join(map(str, sys.version_info[:2]))
        cure = (
            "pip install fastabx"
            if sys.version_info >= (3, 12)
            else f"it needs Python 3.12 or later, and this is {python}"
        )
        raise UserError(
            f"--fastabx: the library isn't installed ({cure}); without the flag, the "
            "same scores are computed here"
        ) from None


def fastabx_errors(groups, cells, frames, distance):
    """The error of each cell, (C,) float64, as `eval.abx_groups.cell_errors` computes it."""
    import polars
    from fastabx import Dataset, Score, Task
    from fastabx.accessor import InMemoryAccessor

    ends = frames.starts + frames.sizes
    spans = dict(enumerate(zip(frames.starts.tolist(), ends.tolist(), strict=True)))
    accessor = InMemoryAccessor(spans, frames.frames, frames.frames.device)
    accessor.is_normalized = distance == "cosine"  # already done, as in the original program
    labels = polars.DataFrame({"item": range(len(spans))})
    members = [piece.tolist() for piece in groups.members.split(groups.sizes.tolist())]
    columns = {
        f"index_{name}": [members[group] for group in column]
        for name, column in zip("abx", cells.T.tolist(), strict=True)
    }
    names = [""] * len(cells)
    table = polars.DataFrame({"header": names, "description": names, **columns})
    within = bool((cells[:, 0] == cells[:, 2]).all())
    task = Task.from_cells(Dataset(labels, accessor), table, is_symmetric=within)
    score = Score(task, METRICS[distance], progress=sys.stderr.isatty())
    return torch.tensor(score.cells["score"].to_list(), dtype=torch.float64)
