"""k nearest neighbours: whether the training frames most alike to a frame have its class.

Nothing is trained, so the result depends on no learning rate. Frames are alike by the cosine of
their features.
"""

import torch
import torch.nn.functional as F

from utils.misc import UserError, in_turns

MAX_BANK, MAX_QUERIES = 200_000, 10_000  # frames of the training and of the validation set
TABLE_FLOATS = {"cpu": 2**26, "cuda": 2**28}  # similarities, or pairs of neighbours, held at once


def nearest_classes(queries, bank, classes, ks):
    """The class that most of the k nearest of `bank` have, for each k of `ks`: k -> (Q,).

    queries (Q, D), bank (N, D), classes (N,) int64. Of several classes as frequent, the one of the
    nearest frame among them is taken.
    """
    found = {k: [] for k in ks}
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    rows = max(1, TABLE_FLOATS[bank.device.type] // max(len(bank), max(ks) ** 2))
    for part in queries.split(rows):
        nearest = classes[(part @ bank.T).topk(max(ks), dim=1).indices]
        for k in ks:
            votes = nearest[:, :k]
            support = (votes[:, :, None] == votes[:, None]).sum(dim=2)
            found[k].append(votes.gather(1, support.argmax(dim=1, keepdim=True))[:, 0])
    return {k: torch.cat(parts) for k, parts in found.items()}


def choose_bank(classes, speakers, total, generator):
    """Random frames, even over classes and, within each, over speakers: a mask (N,).

    classes, speakers: (N,) int64; total: the most frames to choose.
    """
    order = torch.randperm(len(classes), generator=generator)
    for groups in (classes * (speakers.max() + 1) + speakers, classes):
        order = order[in_turns(groups[order])]
    mask = torch.zeros(len(classes), dtype=torch.bool)
    mask[order[:total]] = True
    return mask


def frames_of(source):
    """Class and speaker of each frame of a pass, (N,) each, on the CPU."""
    parts = []
    for _, label, speaker in source.batches(0):
        owner = speaker.view(-1, *[1] * (label.dim() - 1)).expand_as(label)
        parts.append(torch.stack([label.flatten(), owner.flatten()]).cpu())
    return torch.cat(parts, dim=1)


def features_at(source, mask):
    """The features of the frames in `mask` (N,) of a pass, (n, D)."""
    chosen, first = [], 0
    for features, label, _ in source.batches(0):
        part = mask[first : first + label.numel()].to(features.device)
        chosen.append(features.flatten(0, 1)[part])
        first += label.numel()
    return torch.cat(chosen)


@torch.no_grad()
def knn_accuracies(training, validation, ks, speaker_names, generator):
    """Accuracies for each k, and on how many frames of which classes and speakers, as a dict.

    training, validation: sources of ProbeBatches whose passes are all the same.
    """
    classes, speakers = frames_of(training)
    bank = choose_bank(classes, speakers, MAX_BANK, generator)
    if bank.sum() < max(ks):
        raise UserError(
            f"--knn {max(ks)}: there are {bank.sum()} training frames; give a smaller k"
        )
    true, _ = frames_of(validation)
    asked = torch.zeros(len(true), dtype=torch.bool)
    asked[torch.randperm(len(true), generator=generator)[:MAX_QUERIES]] = True
    features = features_at(training, bank)
    labels = classes[bank].to(features.device)
    found = nearest_classes(features_at(validation, asked), features, labels, ks)
    true = true[asked].to(features.device)
    owners, n_frames = speakers[bank].unique(return_counts=True)
    names = [speaker_names[owner] for owner in owners.tolist()]
    return {
        "val_acc": {str(k): (guess == true).double().mean().item() for k, guess in found.items()},
        "validation_frames": len(true),
        "bank": {
            "frames": int(bank.sum()),
            "of": len(bank),
            "classes": {str(c): int((labels == c).sum()) for c in labels.unique().tolist()},
            "speakers": dict(zip(names, n_frames.tolist(), strict=True)),
        },
    }
