"""Features of zero mean and unit variance, over an utterance or over all frames of a speaker."""

import contextlib

import torch

from utils.misc import UserError

FEATURE_NORMS = ("none", "speaker", "utterance")
SMALLEST_VARIANCE = 1e-8  # added to each variance


def seq_normalization(features):
    """(B, S, D) -> (B, S, D), each feature normalised to zero mean and unit variance over time."""
    correction = int(features.size(1) > 1)  # the unbiased variance of a single frame is undefined
    variance, mean = torch.var_mean(features, dim=1, correction=correction, keepdim=True)
    return (features - mean) / torch.sqrt(variance + SMALLEST_VARIANCE)


class GroupStatistics:
    """Mean and unbiased variance of the features of each group, such as a speaker.

    Features normalised this way separate speakers less well, and phones better (van Niekerk et al.,
    Interspeech 2021, arXiv:2108.00917).
    """

    def __init__(self, n_groups, n_features, device="cpu"):
        self.counts = torch.zeros(n_groups, 1, dtype=torch.float64, device=device)
        self.sums = torch.zeros(n_groups, n_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.sums)

    def add(self, features, groups):
        """Count frames, features (..., D), as members of groups (...) int64."""
        features, groups = features.flatten(0, -2).double(), groups.flatten()
        self.counts.index_add_(0, groups, torch.ones_like(features[:, :1]))
        self.sums.index_add_(0, groups, features)
        self.squares.index_add_(0, groups, features.square())

    def normalise(self, features, groups):
        """Features (..., D) by mean and variance of their groups (...), in float32."""
        mean = self.sums / self.counts.clamp(min=1)
        variance = (self.squares - self.counts * mean.square()) / (self.counts - 1).clamp(min=1)
        deviation = (variance.clamp(min=0) + SMALLEST_VARIANCE).sqrt()
        return (features - mean.float()[groups]) / deviation.float()[groups]


class NormalisedFeatures:
    """The function `features_of(name)`, (T, D) or None, with the features of a file normalised.

    kind: "utterance" or "speaker"; speakers: name -> speaker of all files, for the latter, which
    computes the features of each file twice. UserErrors of `features_of` are passed on.
    """

    def __init__(self, features_of, kind, speakers):
        self.features_of, self.kind = features_of, kind
        self.speakers, self.statistics = speakers, {}  # statistics: speaker -> GroupStatistics

    def __call__(self, name):
        features = self.features_of(name)
        if features is None:
            return None
        if self.kind == "utterance":
            return seq_normalization(features[None])[0]
        speaker, width = self.speakers[name], features.size(1)
        if speaker not in self.statistics:
            self.statistics[speaker] = self._statistics_of(speaker, width)
        if self.statistics[speaker].sums.size(1) != width:
            raise UserError(f"{name}: {width} dimensions, unlike other files of its speaker")
        return self.statistics[speaker].normalise(features, _one_group(features))

    def _statistics_of(self, speaker, width):
        statistics = GroupStatistics(1, width)
        for name in [name for name, other in self.speakers.items() if other == speaker]:
            with contextlib.suppress(UserError):  # raised again where the file itself is asked for
                features = self.features_of(name)
                if features is not None and features.size(1) == width:
                    statistics.add(features, _one_group(features))
        return statistics


def _one_group(features):
    return torch.zeros(len(features), dtype=torch.int64)
