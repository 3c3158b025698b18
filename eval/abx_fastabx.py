"""The same ABX task done by the fastabx library, as a check and where its speed is wanted.

https://pypi.org/project/fastabx, for Python 3.12 and later. It gets the very items, groups and
cells that are compared here, so that its errors are those of `eval.abx_groups.cell_errors`.
"""

import importlib.metadata
import sys

import torch

from utils.misc import UserError

METRICS = {"cosine": "angular", "euclidean": "euclidean"}


def require_fastabx():
    """Name and version of the library. Raises UserError, with the cure, where there is none."""
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
            f"--fastabx: the library isn't installed ({cure}); without the flag, the same "
            "scores are computed here"
        ) from None


def fastabx_errors(groups, cells, frames, distance):
    """What `eval.abx_groups.cell_errors` computes: share of errors (C,) float64 of each cell."""
    import polars
    from fastabx import Dataset, Score, Task
    from fastabx.accessor import InMemoryAccessor

    ends = frames.starts + frames.sizes
    spans = dict(enumerate(zip(frames.starts.tolist(), ends.tolist(), strict=True)))
    accessor = InMemoryAccessor(spans, frames.frames, frames.frames.device)
    accessor.is_normalized = distance == "cosine"  # these frames are, in the original's way
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
