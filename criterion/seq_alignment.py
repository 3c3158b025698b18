"""From frame-wise labels and probabilities to label sequences, and how wrong those are.

Label runs are collapsed to sequences, CTC outputs are decoded by prefix beam search (Graves 2012,
"Supervised sequence labelling with recurrent neural networks", section 7.5; in the form of Hannun
et al. 2014, arXiv:1408.2873), and sequences are compared by edit distance.
"""

import torch

_NOTHING = -1  # no symbol was appended
_EXCLUDED = -1.0  # below every probability: never kept while a real candidate is left
_EMPTY_PREFIX = 0x243F6A8885A308D3  # hash of the empty prefix
_UNUSED = 0x13198A2E03707344  # hash of a place in the beam that holds no prefix
_NO_PARENT = 0x299F31D0082EFA98  # hash in place of the empty prefix's parent
_HASH_FACTOR = 0x5851F42D4C957F2D
_FRAMES_PER_SCALE = 16  # the best prefix shrinks by less than the number of symbols in each
_SMALLEST = 1e-300


def collapse_label_chain(labels):
    """Drop each label that equals its predecessor.

    labels: (N, T) integers. Returns the collapsed rows, padded with 0 to the longest (N, longest)
    int64, and their lengths (N,) int64.
    """
    labels = labels.long()
    starts_run = torch.ones_like(labels, dtype=torch.bool)
    starts_run[:, 1:] = labels[:, 1:] != labels[:, :-1]
    lengths = starts_run.sum(dim=1)
    collapsed = labels.new_zeros(labels.shape[0], int(lengths.max()))
    filled = torch.arange(collapsed.shape[1], device=labels.device) < lengths[:, None]
    collapsed[filled] = labels[starts_run]  # both masks are read row by row, so the orders agree
    return collapsed, lengths


def phone_error_rate(hypotheses, references):
    """Mean over sequences of edit distance / length of the reference: 0 is perfect, 1 can be
    exceeded.

    hypotheses, references: equally many sequences (lists) of labels.
    """
    from utils.torchaudio_import import torchaudio

    distance = torchaudio.functional.edit_distance
    rates = [
        distance(reference, hypothesis) / max(len(reference), 1)
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return sum(rates) / len(rates)


def best_label_sequences(probabilities, blank, n_keep, lengths=None):
    """The most probable label sequence of each utterance, as N lists; see `beam_search_batch`."""
    _, symbols = beam_search_batch(probabilities, blank, n_keep, lengths)
    return [[s for s in row if s != _NOTHING] for row in symbols[:, 0].tolist()]


def beam_search(probabilities, n_keep, blank):
    """Prefix beam search over one utterance.

    probabilities: (T, P), of each symbol in each frame. Returns at most `n_keep` pairs
    (probability of the label sequence, [labels]), the most probable first.
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

    probabilities: (N, T, P), of each symbol in each frame; `lengths` (N,): frames that count
    (default: all). The probability of a label sequence is the sum over its alignments, with one
    symbol, `blank`, for no label; equal neighbours need a blank between them.

    Returns log probabilities (N, n_keep), the highest first, -inf where there are fewer sequences,
    and (N, n_keep, T): the label that each sequence gains in each frame, -1 where none.
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
    """Past its end an utterance is certainly blank, which changes neither prefixes nor scores."""
    frames = torch.arange(probabilities.shape[1], device=probabilities.device)
    ended = frames >= torch.as_tensor(lengths, device=probabilities.device)[:, None]
    only_blank = torch.zeros_like(probabilities[0, 0])
    only_blank[blank] = 1.0
    return torch.where(ended[:, :, None], only_blank, probabilities)


class _Beam:
    """The kept prefixes of N utterances. All tensors are (N, n_keep).

    A prefix is known by a 64-bit hash of its labels and by that of its parent, the prefix without
    the last label; its labels themselves are read off the appended symbols at the end.
    Probabilities are kept relative to the best prefix, so that long utterances don't underflow.
    """

    def __init__(self, n_utterances, n_symbols, n_keep, blank, device):
        def full(value, dtype=torch.int64):
            return torch.full((n_utterances, n_keep), value, dtype=dtype, device=device)

        self.blank = blank
        self.hash, self.parent_hash = full(_UNUSED), full(_NO_PARENT)
        self.last = full(blank)  # the last label; blank where there is none
        self.ends_in_blank = full(0.0, torch.float64)
        self.ends_in_label = full(0.0, torch.float64)
        self.hash[:, 0] = _EMPTY_PREFIX
        self.ends_in_blank[:, 0] = 1.0
        self.log_scale = torch.zeros(n_utterances, 1, dtype=torch.float64, device=device)
        # The extension of place i by the label of rank r (both from 0) is at most as probable as
        # those of places 0 to i by labels of ranks 0 to r, save one of each place, its last label.
        # Where these alone fill the beam, it needn't be looked at.
        place = torch.arange(n_keep, device=device)[:, None]
        rank = torch.arange(n_symbols, device=device)
        self.places, self.ranks = ((place + 1) * rank <= n_keep).nonzero(as_tuple=True)

    def log_scores(self):
        return (self.ends_in_blank + self.ends_in_label).log() + self.log_scale

    def advance(self, probabilities, order):
        """Take in a frame: probabilities (N, P), and the labels from the most probable on, (N, P).

        Returns (N, n_keep) twice: the place in the beam before the frame that each new prefix came
        from, and the label it gained (-1: none).
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
        self._rename(source, gained, unused=score < 0)
        return source, gained

    def _extensions(self, probabilities, total, of_last):
        """Probabilities of every kept prefix with one label more, (N, n_keep * P)."""
        extended = total[:, :, None] * probabilities[:, None, :]
        # A label after itself is a new label only if a blank stood between.
        repeated = (self.ends_in_blank * of_last)[:, :, None]
        extended.scatter_(2, self.last[:, :, None], repeated)
        extended[:, :, self.blank] = _EXCLUDED
        return extended.flatten(1)

    def _take_extensions_to_kept(self, extended, n_symbols):
        """An extension that leads to a prefix kept already adds to it and is struck out.

        Returns what each kept prefix gains, (N, n_keep).
        """
        is_parent = self.parent_hash[:, :, None] == self.hash[:, None, :]  # [n, child, parent]
        found, parent = is_parent.max(dim=2)
        # Where no parent is kept, point at an entry that is excluded in any case.
        index = torch.where(found, parent * n_symbols + self.last, self.blank)
        gain = extended.gather(1, index) * found
        extended.scatter_(1, index, _EXCLUDED)
        return gain

    def _rename(self, source, gained, unused):
        """Hashes and last labels of the prefixes that came from `source` by adding `gained`."""
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
        """Make the best prefix's probability 1 again."""
        best = (self.ends_in_blank + self.ends_in_label).amax(dim=1, keepdim=True)
        best = best.clamp(min=_SMALLEST)
        self.ends_in_blank /= best
        self.ends_in_label /= best
        self.log_scale += best.log()


def _trace_back(steps):
    """(N, n_keep, T): the labels gained along the way to each final prefix."""
    sources, gained = (torch.stack(column) for column in zip(*steps, strict=True))  # (T, N, n_keep)
    place = torch.arange(sources.shape[2], device=sources.device).expand_as(sources[0])
    symbols = torch.empty_like(gained)
    for t in reversed(range(len(steps))):
        symbols[t] = gained[t].gather(1, place)
        place = sources[t].gather(1, place)
    return symbols.permute(1, 2, 0)
