"""Sums over one pass of a probe through a set, and the accuracies in them."""

from criterion.seq_alignment import best_label_sequences, collapse_label_chain, phone_error_rate
from utils.run.logs import RunningMeans

BEAM = 20  # label sequences kept in CTC decoding; 100 would take four times as long


class PassSummary:
    """Sums over one pass through a set; they stay on the device until they are read."""

    def __init__(self, n_classes):
        self.n_classes = n_classes
        self.means, self.n_batches, self.class_counts = RunningMeans(), 0, 0

    def add(self, loss, accuracy, label):
        self.means.add(loss, accuracy, len(label))
        self.class_counts += label.flatten().bincount(minlength=self.n_classes)
        self.n_batches += 1

    @property
    def n_frames(self):
        return int(self.class_counts.sum())

    @property
    def loss(self):
        return self.means.means()[0][0]

    @property
    def accuracy(self):
        return self.means.means()[1][0]


class ValidationSummary(PassSummary):
    """Also collects the confusions of phones, or with CTC the phone sequences.

    `frames` and `right` count all frames and those recognised, by speaker (rows) and class
    (columns); where `n_speakers` is 1, of all speakers together.
    """

    def __init__(self, n_classes, n_speakers=1):
        super().__init__(n_classes)
        self.n_speakers, self.frames, self.right = n_speakers, 0, 0
        self.confusion = None  # [true, predicted]
        self.hypotheses, self.references = [], []

    def add_right(self, logits, label, speaker):
        shape = self.n_speakers, self.n_classes
        cells = label + speaker.view(-1, *[1] * (label.dim() - 1)) * self.n_classes
        cells = label if self.n_speakers == 1 else cells
        right = cells[logits.argmax(dim=-1) == label]
        self.frames += cells.flatten().bincount(minlength=shape[0] * shape[1]).view(shape)
        self.right += right.bincount(minlength=shape[0] * shape[1]).view(shape)

    def add_confusion(self, logits, label):
        n = self.n_classes
        pairs = label.flatten() * n + logits.argmax(dim=-1).flatten()
        counts = pairs.bincount(minlength=n * n).view(n, n)
        self.confusion = counts if self.confusion is None else self.confusion + counts

    def add_sequences(self, logits, label, blank):
        self.hypotheses += best_label_sequences(logits.softmax(dim=-1), blank, BEAM)
        sequences, lengths = collapse_label_chain(label)
        self.references += [
            row[:length] for row, length in zip(sequences.tolist(), lengths.tolist(), strict=True)
        ]

    @property
    def error_rate(self):
        return phone_error_rate(self.hypotheses, self.references)


def accuracies(right, frames, names, majority=None):
    """name -> {"accuracy", "frames"} of the classes or speakers that have frames, (n,) each.

    majority: (n,) frames of the class that is most frequent in training, to add its share: the
    accuracy of always naming that one.
    """
    found = {}
    for i in frames.nonzero().flatten().tolist():
        n = frames[i].item()
        found[names[i]] = {"accuracy": right[i].item() / n, "frames": n}
        if majority is not None:
            found[names[i]]["majority_class"] = majority[i].item() / n
    return found
