"""Classifiers of speakers and phones on top of the features, for probes and supervised training.

Each is a criterion with the interface of the others, `criterion(context, encoded, label)`; its
attribute `target` says which label of a batch that is, "speaker" or "phone".
"""

import torch
import torch.nn.functional as F
from torch import nn

from criterion.prediction import CriterionOutput
from criterion.seq_alignment import collapse_label_chain


def build_classifier(n_features, n_classes, n_layers=1, n_outputs=None):
    """A linear layer, or `n_layers` of them with ReLU between.

    Every layer has `n_classes` neurons, the last one `n_outputs` (default: `n_classes`).
    """
    widths = [n_features] + [n_classes] * (n_layers - 1) + [n_outputs or n_classes]
    return _stack_layers(widths)


def _stack_layers(widths):
    linears = [nn.Linear(n_in, n_out) for n_in, n_out in zip(widths, widths[1:], strict=False)]
    if len(linears) == 1:
        return linears[0]
    layers = [linears[0]]
    for linear in linears[1:]:
        layers += [nn.ReLU(), linear]
    return nn.Sequential(*layers)


def _mean_accuracy(logits, label):
    return (logits.argmax(dim=-1) == label).double().mean().view(1, 1)


class _Classifier(nn.Module):
    """What all classifiers share. Subclasses define `logits` and `loss_and_accuracy`."""

    target = "phone"

    def forward(self, context, encoded, label, capture=frozenset(), generator=None):
        """context (B, S, C), encoded (B, S, E), label (B,) of speakers or (B, S) of phones.

        Returns a CriterionOutput: mean loss (1, 1), share of right answers (1, 1) and nothing
        captured. There is nothing random here; `generator` is part of the common interface.
        """
        loss, accuracy = self.loss_and_accuracy(self.logits(context, encoded), label)
        return CriterionOutput(loss, accuracy, {})


class SpeakerCriterion(_Classifier):
    """Who speaks, from the last frame of the context."""

    target = "speaker"

    def __init__(self, n_features, n_speakers, n_layers=1):
        super().__init__()
        self.linearSpeakerClassifier = build_classifier(n_features, n_speakers, n_layers)

    def logits(self, context, encoded=None):
        """(B, S, C) -> (B, n_speakers)"""
        return self.linearSpeakerClassifier(context[:, -1])

    def loss_and_accuracy(self, logits, label):
        """Mean cross-entropy and accuracy, each (1, 1)."""
        return F.cross_entropy(logits, label).view(1, 1), _mean_accuracy(logits, label)


class SpeakerDoubleCriterion(SpeakerCriterion):
    """The same through a bottleneck of `n_inner` dimensions, without a non-linearity.

    The first layer spans the directions that tell speakers apart; the null-space probes remove
    them.
    """

    def __init__(self, n_features, n_inner, n_speakers):
        nn.Module.__init__(self)
        self.linearSpeakerClassifier = nn.Sequential(
            nn.Linear(n_features, n_inner), nn.Linear(n_inner, n_speakers)
        )


class PhoneCriterion(_Classifier):
    """Which phone each frame belongs to, from contexts or, with `on_encoder`, encoded frames."""

    def __init__(self, n_features, n_phones, on_encoder=False, n_layers=1):
        super().__init__()
        self.PhoneCriterionClassifier = build_classifier(n_features, n_phones, n_layers)
        self.on_encoder = on_encoder

    def logits(self, context, encoded=None):
        """(B, S, C) or (B, S, E) -> (B, S, n_phones)"""
        return self.PhoneCriterionClassifier(encoded if self.on_encoder else context)

    def loss_and_accuracy(self, logits, label):
        """Mean cross-entropy and accuracy over all frames, each (1, 1)."""
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten())
        return loss.view(1, 1), _mean_accuracy(logits, label)


class CTCPhoneCriterion(_Classifier):
    """Which phones are said, in which order, from contexts: connectionist temporal classification
    (Graves et al. 2006). The frame labels serve as their sequence, without repetitions.

    The last layer has one output more than there are phones, the blank. Classifiers of the
    original program may have other widths; a loaded one keeps them.
    """

    def __init__(self, n_features, n_phones, on_encoder=False, n_layers=1):
        super().__init__()
        if on_encoder:
            raise ValueError("the CTC phone classifier works on contexts, not on encoded frames")
        self.PhoneCriterionClassifier = build_classifier(
            n_features, n_phones, n_layers, n_outputs=n_phones + 1
        )
        self.blank = n_phones
        self.register_load_state_dict_pre_hook(_take_stored_widths)

    def logits(self, context, encoded=None):
        """(B, S, C) -> (B, S, n_phones + 1)"""
        return self.PhoneCriterionClassifier(context)

    def loss_and_accuracy(self, logits, label):
        """CTC loss / length of the label sequence, mean over the batch, (1, 1); a row that has
        more labels than frames allow counts 0. There is no accuracy by frames: 0."""
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
    """Before a state is loaded, give the inner layers the widths that they have in it."""
    classifier = criterion.PhoneCriterionClassifier
    if not isinstance(classifier, nn.Sequential):
        return
    for name, linear in classifier.named_children():
        stored = state_dict.get(f"{prefix}PhoneCriterionClassifier.{name}.weight")
        if stored is None or not isinstance(linear, nn.Linear):
            continue
        n_outputs, n_inputs = stored.shape
        if linear is not classifier[-1]:  # the last width is the number of classes: not adapted
            linear.out_features, linear.bias.data = n_outputs, linear.bias.new_empty(n_outputs)
        if linear is not classifier[0]:  # nor the first, the number of features
            linear.in_features = n_inputs
        linear.weight.data = linear.weight.new_empty(linear.out_features, linear.in_features)
