"""Speaker and phone classifiers on top of the features, for probes and supervised training.

Each has the interface of all criteria, `criterion(context, encoded, label)`; its attribute `target`
names the label in a `Batch` that it takes, "speaker" or "phone".
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from criterion.prediction import CriterionOutput
from criterion.seq_alignment import collapse_label_chain
from utils.misc import NO_CHANCE, Chance


def build_classifier(n_features, n_classes, n_layers=1, n_outputs=None, n_hidden=None):
    """`n_layers` linear layers with ReLU between them.

    Each layer has `n_hidden` outputs, the last one `n_outputs` (default of both: `n_classes`).
    """
    widths = [n_features] + [n_hidden or n_classes] * (n_layers - 1) + [n_outputs or n_classes]
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers[1:]) if n_layers > 1 else layers[1]


def _mean_accuracy(logits, label):
    return (logits.argmax(dim=-1) == label).double().mean().view(1, 1)


class _Classifier(nn.Module):
    """Base of all classifiers. Subclasses define `logits` and `loss_and_accuracy`."""

    target = "phone"
    step_name, has_accuracy = None, True

    def forward(self, context, encoded, label, capture=frozenset(), generator=None):
        """context (B, S, C), encoded (B, S, E), label (B,) of speakers or (B, S) of phones.

        Returns a CriterionOutput: mean loss (1, 1), accuracy (1, 1) and nothing captured.
        `capture` and `generator` belong to the common interface and are ignored.
        """
        loss, accuracy = self.loss_and_accuracy(self.logits(context, encoded), label)
        return CriterionOutput(loss, accuracy, {})

    def chance(self):
        """The Chance of giving all classes the same probability."""
        *_, last = (part for part in self.modules() if isinstance(part, nn.Linear))
        return Chance(math.log(last.out_features), 1 / last.out_features)


class SpeakerCriterion(_Classifier):
    """Classify the speaker from the last frame of the context."""

    target = "speaker"

    def __init__(self, n_features, n_speakers, n_layers=1, n_hidden=None):
        super().__init__()
        self.linearSpeakerClassifier = build_classifier(
            n_features, n_speakers, n_layers, n_hidden=n_hidden
        )

    def logits(self, context, encoded=None):
        """(B, S, C) -> (B, n_speakers)"""
        return self.linearSpeakerClassifier(context[:, -1])

    def loss_and_accuracy(self, logits, label):
        """Mean cross-entropy and accuracy, each (1, 1)."""
        return F.cross_entropy(logits, label).view(1, 1), _mean_accuracy(logits, label)


class SpeakerDoubleCriterion(SpeakerCriterion):
    """A speaker classifier with a linear bottleneck of `n_inner` dimensions.

    The first layer spans the directions that separate speakers; the null-space probes project them
    out.
    """

    def __init__(self, n_features, n_inner, n_speakers):
        nn.Module.__init__(self)
        self.linearSpeakerClassifier = nn.Sequential(
            nn.Linear(n_features, n_inner), nn.Linear(n_inner, n_speakers)
        )


class PhoneCriterion(_Classifier):
    """Classify the phone of each frame, from contexts or, with `on_encoder`, encoded frames."""

    def __init__(self, n_features, n_phones, on_encoder=False, n_layers=1, n_hidden=None):
        super().__init__()
        self.PhoneCriterionClassifier = build_classifier(
            n_features, n_phones, n_layers, n_hidden=n_hidden
        )
        self.on_encoder = on_encoder

    def logits(self, context, encoded=None):
        """(B, S, C) or (B, S, E) -> (B, S, n_phones)"""
        return self.PhoneCriterionClassifier(encoded if self.on_encoder else context)

    def loss_and_accuracy(self, logits, label):
        """Mean cross-entropy and accuracy over all frames, each (1, 1)."""
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten())
        return loss.view(1, 1), _mean_accuracy(logits, label)


class CTCPhoneCriterion(_Classifier):
    """Recognise the phone sequence from contexts by connectionist temporal classification (Graves
    et al. 2006). The reference is the sequence of frame labels without repetitions.

    The last output is the blank. Inner layers take the widths of a loaded state, since classifiers
    of the original program have other widths.
    """

    has_accuracy = False

    def __init__(self, n_features, n_phones, on_encoder=False, n_layers=1, n_hidden=None):
        super().__init__()
        if on_encoder:
            raise ValueError("the CTC phone classifier works on contexts, not on encoded frames")
        self.PhoneCriterionClassifier = build_classifier(
            n_features, n_phones, n_layers, n_outputs=n_phones + 1, n_hidden=n_hidden
        )
        self.blank = n_phones
        self.register_load_state_dict_pre_hook(_take_stored_widths)

    def logits(self, context, encoded=None):
        """(B, S, C) -> (B, S, n_phones + 1)"""
        return self.PhoneCriterionClassifier(context)

    def chance(self):
        """Unknown: it depends on the lengths of the sequences."""
        return NO_CHANCE

    def loss_and_accuracy(self, logits, label):
        """CTC loss per label, averaged over the batch, (1, 1); rows with more labels than frames
        allow count as 0. The accuracy, (1, 1), is always 0: CTC has none per frame."""
        sequences, lengths = collapse_label_chain(label)
        n_rows, n_frames, _ = logits.shape
        loss = F.ctc_loss(
            logits.log_softmax(dim=2).transpose(0, 1),
            sequences,
            torch.full((n_rows,), n_frames, device=lengths.device),
            lengths,
            blank=self.blank,
            zero_infinity=True,
        )
        return loss.view(1, 1), torch.zeros(1, 1, device=logits.device)


def _take_stored_widths(criterion, state_dict, prefix, *_):
    """Resize the inner layers to the widths in a state that is about to be loaded."""
    classifier = criterion.PhoneCriterionClassifier
    if not isinstance(classifier, nn.Sequential):
        return
    for name, linear in classifier.named_children():
        stored = state_dict.get(f"{prefix}PhoneCriterionClassifier.{name}.weight")
        if stored is None or not isinstance(linear, nn.Linear):
            continue
        n_outputs, n_inputs = stored.shape
        if linear is not classifier[-1]:  # the output width is the number of classes: fixed
            linear.out_features, linear.bias.data = n_outputs, linear.bias.new_empty(n_outputs)
        if linear is not classifier[0]:  # the input width is that of the features: fixed
            linear.in_features = n_inputs
        linear.weight.data = linear.weight.new_empty(linear.out_features, linear.in_features)
