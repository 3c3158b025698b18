"""Label sequences from frame labels or CTC outputs, and their error rate.

Runs of equal labels are collapsed; CTC outputs are decoded by prefix beam search (Graves 2012,
"Supervised sequence labelling with recurrent neural networks", section 7.5; in the formulation of
Hannun et al. 2014, arXiv:1408.2873); sequences are compared by edit distance.
"""

import torch

_NOTHING = -1  # no label was appended
_EXCLUDED = -1.0  # below every probability: kept only if nothing else is left
_EMPTY_PREFIX = 0x243F6A8885A308D3  # hash of the empty prefix
_UNUSED = 0x13198A2E03707344  # hash of an unused beam entry
_NO_PARENT = 0x299F31D0082EFA98  # hash that stands for the parent of the empty prefix
_HASH_FACTOR = 0x5851F42D4C957F2D
_FRAMES_PER_SCALE = 16  # in each frame, the best prefix shrinks at most by the number of symbols
_SMALLEST = 1e-300


def collapse_label_chain(labels):
    """Drop each label that equals its predecessor.

    labels: (N, T) integers. Returns the collapsed rows, padded with 0 to the longest, (N, longest)
    int64, and their lengths, (N,) int64.
    """
    labels = labels.long()
    starts_run = torch.ones_like(labels, dtype=torch.bool)
    starts_run[:, 1:] = labels[:, 1:] != labels[:, :-1]
    lengths = starts_run.sum(dim=1)
    collapsed = labels.new_zeros(labels.shape[0], int(lengths.max()))
    filled = torch.arange(collapsed.shape[1], device=labels.device) < lengths[:, None]
    collapsed[filled] = labels[starts_run]  # both masks are read in row-major order
    return collapsed, lengths


def phone_error_rate(hypotheses, references):
    """Mean over sequences of edit distance / reference length; 0 is perfect, it may exceed 1.

    hypotheses, references: lists of the same number of label sequences (lists).
    """
    from utils.torchaudio_import import torchaudio

    distance = torchaudio.functional.edit_distance
    rates = [
        distance(reference, hypothesis) / max(len(reference), 1)
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return sum(rates) / len(rates)


def best_label_sequences(probabilities, blank, n_keep, lengths=None):
    """The most probable label sequence of each utterance, N lists; see `beam_search_batch`."""
    _, symbols = beam_search_batch(probabilities, blank, n_keep, lengths)
    return [[s for s in row if s != _NOTHING] for row in symbols[:, 0].tolist()]


def beam_search(probabilities, n_keep, blank):
    """Prefix beam search over one utterance.

    probabilities: (T, P), per frame and symbol. Returns at most `n_keep` pairs (probability of the
    label sequence, [labels]), the most probable first.
    """
    log_scores, symbols = beam_search_batch(probabilities[None], blank, n_keep)
    return [
        (score, [s for s in row if s != _NOTHING])
        for score, row in zip(log_scores[0].exp().tolist(), symbols[0].tolist(), strict=True)
        if score > 0
    ]


@torch.no_grad()
def beam_search_batch(probabilities, blank, n_keep, lengths=None):
    """Prefix beam search over several utterances at once.

    probabilities: (N, T, P), per frame and symbol; lengths: (N,) frames in use (default: all).
    The probability of a label sequence is summed over its alignments; the symbol `blank` means no
    label, and separates equal neighbours.

    Returns log-probabilities (N, n_keep), the highest first, -inf if there are fewer sequences, and
    (N, n_keep, T): the label that each sequence gains in each frame, -1 for none.
    """
    n_utterances, n_frames, n_symbols = probabilities.shape
    probabilities = probabilities.double()
    if lengths is not None:
        probabilities = _blank_after(probabilities, lengths, blank)
    order = probabilities.clone()
    order[:, :, blank] = _EXCLUDED
    order = order.argsort(dim=2, descending=True)
    beam = _Beam(n_utterances, n_symbols, n_keep, blank, probabilities.device)
    steps = []
    for t in range(n_frames):
        steps.append(beam.advance(probabilities[:, t], order[:, t]))
        if t % _FRAMES_PER_SCALE == 0:
            beam.rescale()
    return beam.log_scores(), _trace_back(steps)


def _blank_after(probabilities, lengths, blank):
    """Make the frames past each end certainly blank: prefixes and scores don't change there."""
    frames = torch.arange(probabilities.shape[1], device=probabilities.device)
    ended = frames >= torch.as_tensor(lengths, device=probabilities.device)[:, None]
    only_blank = torch.zeros_like(probabilities[0, 0])
    only_blank[blank] = 1.0
    return torch.where(ended[:, :, None], only_blank, probabilities)


class _Beam:
    """The prefixes kept for N utterances. All tensors are (N, n_keep).

    A prefix is identified by a 64-bit hash of its labels, and its parent (the prefix without the
    last label) by another; the labels themselves are traced back at the end. Probabilities are
    relative to the best prefix, so that long utterances don't underflow.
    """

    def __init__(self, n_utterances, n_symbols, n_keep, blank, device):
        def full(value, dtype=torch.int64):
            return torch.full((n_utterances, n_keep), value, dtype=dtype, device=device)

        self.blank = blank
        self.hash, self.parent_hash = full(_UNUSED), full(_NO_PARENT)
        self.last = full(blank)  # the last label; blank if there is none
        self.ends_in_blank = full(0.0, torch.float64)
        self.ends_in_label = full(0.0, torch.float64)
        self.hash[:, 0] = _EMPTY_PREFIX
        self.ends_in_blank[:, 0] = 1.0
        self.log_scale = torch.zeros(n_utterances, 1, dtype=torch.float64, device=device)
        # The extension of beam entry i by the label of rank r (both from 0) is at most as probable
        # as those of entries 0 to i by the labels of ranks 0 to r, except for one label of each
        # entry: its last. If these already fill the beam, it need not be considered.
        place = torch.arange(n_keep, device=device)[:, None]
        rank = torch.arange(n_symbols, device=device)
        self.places, self.ranks = ((place + 1) * rank <= n_keep).nonzero(as_tuple=True)

    def log_scores(self):
        return (self.ends_in_blank + self.ends_in_label).log() + self.log_scale

    def advance(self, probabilities, order):
        """Process a frame: probabilities (N, P), and labels (N, P) sorted by them, highest first.

        Returns, each (N, n_keep): the previous beam entry that each new prefix came from, and the
        label that it gained (-1: none).
        """
        n_keep, n_symbols = self.hash.shape[1], probabilities.shape[1]
        total = self.ends_in_blank + self.ends_in_label
        of_last = probabilities.gather(1, self.last)

        stay_blank = total * probabilities[:, self.blank, None]
        stay_label = self.ends_in_label * of_last
        extended = self._extensions(probabilities, total, of_last)
        stay_label += self._take_extensions_to_kept(extended, n_symbols)

        contender = self.places * n_symbols + order[:, self.ranks]
        candidates = torch.cat([stay_blank + stay_label, extended.gather(1, contender)], dim=1)
        score, chosen = candidates.topk(n_keep, dim=1)
        stays = chosen < n_keep
        extension = contender.gather(1, (chosen - n_keep).clamp(min=0))
        source = torch.where(stays, chosen, extension // n_symbols)
        gained = torch.where(stays, _NOTHING, extension % n_symbols)
        self.ends_in_blank = stay_blank.gather(1, source) * stays
        self.ends_in_label = torch.where(stays, stay_label.gather(1, source), score.clamp(min=0))
        self._update_hashes(source, gained, unused=score < 0)
        return source, gained

    def _extensions(self, probabilities, total, of_last):
        """Probabilities of each kept prefix extended by each label, (N, n_keep * P)."""
        extended = total[:, :, None] * probabilities[:, None, :]
        # A repeated label is new only after a blank.
        repeated = (self.ends_in_blank * of_last)[:, :, None]
        extended.scatter_(2, self.last[:, :, None], repeated)
        extended[:, :, self.blank] = _EXCLUDED
        return extended.flatten(1)

    def _take_extensions_to_kept(self, extended, n_symbols):
        """Exclude the extensions that yield a prefix already in the beam.

        Returns the probability that each kept prefix gains from them, (N, n_keep).
        """
        is_parent = self.parent_hash[:, :, None] == self.hash[:, None, :]  # [n, child, parent]
        found, parent = is_parent.max(dim=2)
        # Without a parent in the beam, point at an entry that is excluded anyway.
        index = torch.where(found, parent * n_symbols + self.last, self.blank)
        gain = extended.gather(1, index) * found
        extended.scatter_(1, index, _EXCLUDED)
        return gain

    def _update_hashes(self, source, gained, unused):
        """Hashes and last labels after the prefixes at `source` gained a label each."""
        stays = gained == _NOTHING
        old = self.hash.gather(1, source)
        mixed = (old ^ (gained + 1)) * _HASH_FACTOR  # wraps around
        self.hash = torch.where(stays, old, mixed ^ (mixed >> 29))
        self.parent_hash = torch.where(stays, self.parent_hash.gather(1, source), old)
        self.last = torch.where(stays, self.last.gather(1, source), gained)
        self.hash.masked_fill_(unused, _UNUSED)
        self.parent_hash.masked_fill_(unused, _NO_PARENT)
        self.last.masked_fill_(unused, self.blank)

    def rescale(self):
        """Scale probabilities so that the best prefix has 1."""
        best = (self.ends_in_blank + self.ends_in_label).amax(dim=1, keepdim=True)
        best = best.clamp(min=_SMALLEST)
        self.ends_in_blank /= best
        self.ends_in_label /= best
        self.log_scale += best.log()


def _trace_back(steps):
    """The labels gained on the way to each final prefix, (N, n_keep, T)."""
    sources, gained = (torch.stack(column) for column in zip(*steps, strict=True))  # (T, N, n_keep)
    place = torch.arange(sources.shape[2], device=sources.device).expand_as(sources[0])
    symbols = torch.empty_like(gained)
    for t in reversed(range(len(steps))):
        symbols[t] = gained[t].gather(1, place)
        place = sources[t].gather(1, place)
    return symbols.permute(1, 2, 0)
