"""Discrete units: files of cluster centers, and files of the units that these give.

Centers are read from the files of the original programs (`state_dict.Ck` in a .pt, with its flags
as JSON beside it), from .npy and from .txt, one center per row. Units are one line per audio file,
`name<TAB>unit,unit,...`, one unit per frame of 10 ms.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataset import refuse_too_many
from eval.center_push import read_centers
from feature_loader import FeatureModule, features_in_parts, load_model
from utils.files import lines_of, load_json, load_tensors, save_array, save_json, save_tensors
from utils.kmeans import assign, squared_distances
from utils.misc import UserError, first_few
from utils.normalisation import seq_normalization

LAST = "checkpoint_last.pt"  # centers, in a folder
FEATURES = {  # what centers are centers of, and the value where a file says nothing
    "pathCheckpoint": None, "level_gru": None, "encoder_layer": False, "level": "frames",
    "seq_norm": False, "norm_vec_len": False, "mean_std": None,
}  # fmt: skip
SUPPORTED = {"nGroups": (None, 1), "dimReduction": (None,), "train_mode": (None, False)}
MOST_UNITS = 100_000
KINDS = (".pt", ".pth", ".npy", ".txt")


class Clusters(NamedTuple):
    """Cluster centers, and how the features that they are centers of were made."""

    centers: torch.Tensor  # (K, D)
    features: dict  # with the keys of FEATURES
    path: str


def args_path(path):
    """The file of flags beside a file of centers, as the original programs call it."""
    path = Path(path)
    return path.with_name("args.json" if path.name == LAST else f"{path.stem}_args.json")


def write_clusters(path, centers, features, flags):
    """Write `Clusters` as .pt or .npy, and the flags (a dict) beside them."""
    if path.endswith(".npy"):
        save_array(path, centers.numpy())
    else:
        stored = {"n_clusters": len(centers), "dim": centers.size(1), "mode": "kMean", **features}
        save_tensors(path, {"state_dict": {"Ck": centers[None]}, **stored})
    save_json(args_path(path), {**flags, **features})


def read_clusters(path, explicit, flag="centers"):
    """The `Clusters` of a file, or of a folder with a checkpoint_last.pt.

    explicit: flags of FEATURES, None where not given. They say what the file doesn't; only the
    place of the checkpoint may be another. Raises UserError, naming `flag`, if they contradict it.
    """
    path = os.path.join(path, LAST) if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: holds no centers: no such file")
    if not path.endswith(KINDS):
        raise UserError(
            f"{path}: not one of {' '.join(KINDS)}; a pickle, such as those of scikit-learn, can "
            "run code and isn't read: python -c \"import joblib, numpy; numpy.save('km.npy', "
            f"joblib.load('{path}').cluster_centers_)\" converts it"
        )
    centers, stored = read_centers(path, flag), _stored_features(path)
    for name, value in explicit.items():
        if value is None:
            continue
        if name != "pathCheckpoint" and stored.get(name, value) != value:
            raise UserError(f"--{name}: {path} was made with {stored[name]}: leave out the flag")
        stored[name] = value
    if not stored.get("pathCheckpoint"):
        raise UserError(
            f"{path}: doesn't say which model it clusters: --pathCheckpoint FILE is needed (and "
            "--encoder_layer, --level_gru, --norm_vec_len or --seq_norm, if used)"
        )
    return Clusters(centers, FEATURES | stored, path)


def _stored_features(path):
    """The known flags of the features: of the .pt itself, or beside it."""
    known = {} if path.endswith((".npy", ".txt")) else load_tensors(path)
    beside = (args_path(path), Path(path).with_name("checkpoint_args.json"))
    if found := next((file for file in beside if file.is_file()), None):
        known = load_json(found) | known
    for name, supported in SUPPORTED.items():
        if known.get(name) not in supported:
            raise UserError(f"{found or path}: {name} {known[name]} isn't supported")
    stored = {name: known[name] for name in FEATURES if name in known}
    checkpoint = stored.get("pathCheckpoint")
    if checkpoint and not os.path.exists(checkpoint):  # perhaps relative to the centers
        stored["pathCheckpoint"] = os.path.join(os.path.dirname(path), checkpoint)
    return stored


# ------------------------------------------------------------------------------------ features


def feature_module(features, device):
    """The FeatureModule that computes what the dict `features` describes."""
    choice = {"gru_level": features["level_gru"] or -1, "level": features["level"]}
    model, *_ = load_model([features["pathCheckpoint"]], **choice)
    return FeatureModule(model, features["encoder_layer"]).to(device)


def features_to_cluster(module, path, features, waveform=None):
    """Yield the features of a file, (T, D) each, or those of another waveform (1, n) for it.

    Raises UserError if they aren't finite.
    """
    parts = features_in_parts(module, path, waveform=waveform)
    if features["seq_norm"]:
        parts = [seq_normalization(torch.cat(list(parts))[None])[0]]
    for part in parts:
        if not part.isfinite().all():
            raise UserError(f"{path}: the model's features of this file aren't finite")
        yield scaled(part, features)


def scaled(frames, features):
    """Frames (..., D) as the dict `features` describes: standardised, or of unit length."""
    if features["mean_std"]:
        mean, std = frames.new_tensor(features["mean_std"])
        frames = (frames - mean) / std
    return F.normalize(frames, dim=-1) if features["norm_vec_len"] else frames


def cluster_features(frames, clusters, as_units=True):
    """Frames (..., D) of a model -> (..., K): 1 at the nearest center and 0 elsewhere, or the
    squared distances to all centers.
    """
    frames, centers = scaled(frames, clusters.features), clusters.centers.to(frames.device)
    if not as_units:
        return squared_distances(frames, centers)
    units = assign(frames.flatten(0, -2), centers)[0].view(frames.shape[:-1])
    return F.one_hot(units, len(centers)).float()


class ClusterFeatures(FeatureModule):
    """A model whose features are those of `cluster_features`."""

    def __init__(self, model, clusters, as_units):
        super().__init__(model, clusters.features["encoder_layer"])
        self.clusters, self.as_units = clusters, as_units

    def forward(self, waveform, continues=None):
        """waveform: (B, 1, L) -> (B, S, K)."""
        return cluster_features(super().forward(waveform, continues), self.clusters, self.as_units)


def read_frame_clusters(path, checkpoint, *, get_encoded, level, gru_level=-1, flag="--clusters"):
    """The `Clusters` of a file for frames of `checkpoint`, whatever part of a file they are from.

    Raises UserError if they need whole files, or contradict the flags.
    """
    explicit = {
        "pathCheckpoint": checkpoint,
        "encoder_layer": get_encoded or None,
        "level": level if level != "frames" else None,
        "level_gru": gru_level if gru_level > 0 else None,
    }
    clusters = read_clusters(path, explicit, flag)
    if clusters.features["seq_norm"]:
        raise UserError(
            f"{flag} {path}: of features that are normalised over each file (--seq_norm): only "
            "eval/quantize.py gives their units (--format onehot-npy)"
        )
    return clusters


def check_width(clusters, n_features):
    """Raise UserError unless the centers are of that many dimensions."""
    if clusters.centers.size(1) != n_features:
        raise UserError(
            f"{clusters.path}: centers of {clusters.centers.size(1)} dimensions for features of "
            f"{n_features}: is it another layer (--encoder_layer) or another model?"
        )


def report_unusable(problems, n_files):
    """Print the files that are left out, or raise UserError if they are all, or too many."""
    refuse_too_many(problems, n_files)
    if problems and len(problems) == n_files:
        raise UserError(f"no file can be used: {first_few(problems)}")
    if problems:
        print(f"left out: {first_few(problems)}")


# ---------------------------------------------------------------------------------------- units


def unit_line(name, units):
    return f"{name}\t{','.join(map(str, units))}"


def read_units(path):
    """Name -> units (n,) int64 of lines `name<TAB>u,u,...`, `name|u u ...` or `name u u ...`.

    Raises UserError with the number of a line that is neither.
    """
    units = {}
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        name, text = split_units(line)
        if name in units:
            raise UserError(f"{path}, line {number}: {first_few([name])} has units already")
        try:
            units[name] = np.array(text.replace(",", " ").split(), dtype=np.int64)
        except (ValueError, OverflowError):
            units[name] = np.empty(0)
        if not len(units[name]) or not 0 <= units[name].min() <= units[name].max() < MOST_UNITS:
            raise UserError(
                f"{path}, line {number}: no name and units, whole numbers from 0 to "
                f"{MOST_UNITS - 1}: {line[:80]!r}"
            )
    if not units:
        raise UserError(f"{path}: no units in this file")
    return units


def split_units(line):
    """A line's name and the text of its units."""
    for separator in ("\t", "|", None):
        name, *rest = line.strip().split(separator, maxsplit=1)
        if rest:
            return name, rest[0]
    return name, ""


def one_hot(units, n_units):
    """Units (n,) -> (n, n_units) float64."""
    return np.eye(n_units)[units]


def deduplicated(units):
    """Units (n,) without those equal to the one before."""
    return units[np.flatnonzero(np.diff(units, prepend=-1))]
