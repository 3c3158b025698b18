"""Discrete units of a model in training: what they say of phones and speakers, as it learns."""

import os

import numpy as np
import torch

from eval.unit_measures import agreement, chance, joint_counts, measure, usage
from eval.units import FEATURES, features_to_cluster
from feature_loader import FeatureModule
from utils.kmeans import assign, kmeans
from utils.misc import SAMPLES_PER_FRAME, UserError

FRAMES = 20_000  # that are clustered: 200 s
STARTS = 3  # of k-means
LOGGED = {  # name -> measure, as its group and its key
    "pnmi": ("frames", "pnmi"),
    "phone_purity": ("frames", "phone_purity"),
    "boundary_f1": ("boundaries", "f1"),
}


def measure_units(model, dataset, phones, n_clusters, generator):
    """Cluster contexts of random files of `dataset`; returns a dict of floats to log.

    phones: path -> phone of each frame, of the files that have labels; without any, what needs
    phones is left out. A model whose frames make no clusters gives {}, and a note.
    """
    try:
        contexts, labels, speakers, starts = collect(model, dataset, phones, generator)
        clusters = kmeans(contexts, n_clusters, generator, n_starts=STARTS)
    except UserError as error:
        print(f"note: no units: {error}")
        return {}
    units = assign(contexts, clusters.centers)[0].numpy()
    values = usage(units, starts)
    logged = {name: values[name] for name in ("perplexity", "bitrate_frames", "frames_per_run")}
    logged["speaker_information"] = agreement(joint_counts(speakers, units))["pnmi"]
    if phones:
        found, by_chance = (of(labels, units, starts) for of in (measure, chance))
        for name, (group, key) in LOGGED.items():
            logged |= {name: found[group][key], f"{name}_by_chance": by_chance[group][key]}
    logged = {f"units_{name}": value for name, value in logged.items() if value is not None}
    print(f"    {', '.join(f'{name} {value:.3g}' for name, value in logged.items())}", flush=True)
    return logged


def most_clusters(dataset, phones):
    """The number of frames that are clustered, at least."""
    files = labelled_files(dataset, phones)
    return min(FRAMES, sum(u.samples // SAMPLES_PER_FRAME for u in files))


def labelled_files(dataset, phones):
    usable = (u for u in dataset.utterances if u.samples >= SAMPLES_PER_FRAME)
    return [u for u in usable if not phones or u.path in phones]


def collect(model, dataset, phones, generator):
    """Contexts (N, D) of whole files, phones (N,) or zeros, speakers (N,), and where files start.

    Raises UserError if a file can't be read, or the contexts aren't finite.
    """
    files = labelled_files(dataset, phones)
    module, found, n_frames = FeatureModule(model, False), [], 0
    for index in torch.randperm(len(files), generator=generator).tolist():
        if n_frames >= FRAMES:
            break
        file = files[index]
        path = os.path.join(dataset.root, file.path)
        frames = torch.cat(list(features_to_cluster(module, path, FEATURES)))
        of_file = np.asarray(phones[file.path] if phones else np.zeros(len(frames)), dtype=int)
        n = min(len(frames), len(of_file))
        found.append((frames[:n], of_file[:n], np.full(n, file.speaker)))
        n_frames += n
    contexts, labels, speakers = zip(*found, strict=True)
    starts = np.cumsum([0, *map(len, contexts[:-1])])
    return torch.cat(contexts), np.concatenate(labels), np.concatenate(speakers), starts
