"""Probes: a small classifier of phones or speakers, trained on the features of a model.

Training runs call `run_probe`; eval/linear_separability.py is the command for a finished model. The
features of a frozen model are computed once and stored if they fit in memory.
"""

import copy
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from criterion.classification import (
    CTCPhoneCriterion,
    PhoneCriterion,
    SpeakerCriterion,
    SpeakerDoubleCriterion,
)
from criterion.seq_alignment import best_label_sequences, collapse_label_chain, phone_error_rate
from eval.probe_features import StoredWindowFeatures, WindowFeatures, storage_for
from segments import layer_name
from utils.data.labels import symbols_beside
from utils.files import remove_leftovers, save_json, save_tensors, writing_to
from utils.misc import SAMPLES_PER_FRAME, counted, percent, seed_from
from utils.report.plot_confusion import draw_confusion
from utils.run.console import progress
from utils.run.logs import RunningMeans, append_epoch

BEAM = 20  # label sequences kept in CTC decoding; 100 would take four times as long
MAX_CONFUSION_CLASSES = 1000  # with more classes, confusions aren't counted
NEAR_MAJORITY = 0.02  # of the frames: a probe no better than its majority class by more than this
VALIDATION_BATCH = 64  # windows in a batch of stored features


@dataclass(frozen=True)
class ProbeOptions:
    """How a probe is trained, and on which features of the model."""

    n_epochs: int = 10
    batch_size: int = 8  # windows
    learning_rate: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 2e-8
    n_layers: int = 1
    ctc: bool = False  # phones: recognise their sequence instead of labelling frames
    get_encoded: bool = False  # features: encoded frames instead of contexts
    level: str = "frames"  # of the model, that gives them
    n_inner: int = 0  # speakers: dimensions of a bottleneck (0: none)
    unfrozen: bool = False  # train the model as well
    logging_step: int = 1  # epochs between writes of the log
    seed: int = 0
    cpc_epoch: int | None = None  # the epoch of the training run, if the model is of one
    max_stored_bytes: int | None = None  # of features; None: as memory allows

    @classmethod
    def of_training_run(cls, args, task, cpc_epoch):
        """The options set by the --linsep_... flags of train.py."""
        phone = task == "phone"
        return cls(
            n_epochs=args.linsep_n_epoch,
            batch_size=args.linsepBatchSizeGPU,
            learning_rate=args.linsep_lr,
            beta1=args.linsep_beta1,
            beta2=args.linsep_beta2,
            epsilon=args.linsep_epsilon,
            n_layers=args.linsep_net_layers,
            ctc=phone and args.CTCphones,
            get_encoded=phone and args.phone_get_encoded,
            level=args.level,
            logging_step=args.linsep_task_logging_step,
            seed=args.random_seed,
            cpc_epoch=cpc_epoch,
        )


class ProbeResult(NamedTuple):
    """The result of a probe. `metric` is the validation accuracy of its best epoch, or with CTC the
    phone error rate (`metric_name` is "acc" or "per"); `train_accuracy` is None with CTC.
    `baseline` is the metric of always predicting the majority class of the training set."""

    task: str
    metric_name: str
    epochs_trained: int
    best_epoch: int
    metric: float
    train_accuracy: float | None
    baseline: float
    measured_on: dict

    def logged(self):
        """The values for the log of a training run."""
        values = {
            "num_epoch_trained": self.epochs_trained,
            f"best_val_{self.metric_name}": [self.metric],
            f"baseline_val_{self.metric_name}": [self.baseline],
        }
        if self.train_accuracy is not None:
            values["best_train_acc"] = [self.train_accuracy]
        return {f"{self.task}_{name}": value for name, value in values.items()}


def run_probe(
    task,
    model,
    train_set,
    validation_set,
    n_classes,
    options,
    *,
    logs_dir,
    checkpoint_dir=None,
    device="cpu",
):
    """Probe a model in its present state, and write the results. Returns a ProbeResult.

    task: "phone" or "speaker"; both AudioDatasets must have its labels. `logs.json`, and for phones
    `confusion.png`, are written to `<logs_dir>/<CPC epoch>/<task>/`; the best epoch's classifier
    and the model it belongs to go to `<checkpoint_dir>/<CPC epoch>/<task>/`.

    The global random generators aren't used. The model's weights don't change; its mode and hidden
    state do: `model.preserved_state` restores these.
    """
    place = Path(str(options.cpc_epoch), task)
    log = Path(logs_dir, place, "logs.json")
    probe = Probe(task, model, train_set, validation_set, n_classes, options, device)
    for directory in (logs_dir, checkpoint_dir or logs_dir):
        remove_leftovers(Path(directory, place))

    def write_log(epoch):
        if epoch > 0 and epoch % options.logging_step == 0:
            save_json(log, probe.logs)

    with writing_to(logs_dir, "--linsep_logs_dir"):
        result = probe.run(write_log)
        save_json(log, probe.logs)
        probe.draw_confusion(log.with_name("confusion.png"))
    if checkpoint_dir:
        with writing_to(checkpoint_dir, "--linsep_checkpoint_dir"):
            save_best_classifier(probe, Path(checkpoint_dir, place))
    return result


def save_best_classifier(probe, directory):
    """Save the best epoch's classifier, and delete that of an earlier run of the same probe."""
    start, end = f"{probe.task}_classif_best-epoch", f"-cpc_epoch{probe.options.cpc_epoch}.pt"
    path = directory / f"{start}{probe.best.epoch}{end}"
    state = {
        "CPCmodel": probe.best.model,
        "classifNetCriterionCombined": probe.best.classifier,
        "optimizer": probe.best.optimizer,
    }
    save_tensors(path, state)
    for other in set(directory.glob(f"{start}*{end}")) - {path}:
        other.unlink()


# ----------------------------------------------------------------------------------- training


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
    """Also collects the confusions of phones, or with CTC the phone sequences."""

    def __init__(self, n_classes):
        super().__init__(n_classes)
        self.confusion = None  # [true, predicted]
        self.hypotheses, self.references = [], []

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


class BestEpoch(NamedTuple):
    """The metric and all states after the best epoch of a probe."""

    epoch: int
    metric: float
    train_accuracy: float | None  # None with CTC
    confusion: torch.Tensor | None
    classifier: dict
    optimizer: dict
    model: dict


class Probe:
    """A classifier of the features of a model, and its training.

    After each epoch `logs` holds lists over the epochs, with the keys of `checkpoint_logs.json`,
    and `best` the best epoch so far. `transform` is applied to the features, (B, S, D).
    """

    def __init__(
        self,
        task,
        model,
        train_set,
        validation_set,
        n_classes,
        options,
        device="cpu",
        transform=None,
    ):
        self.task, self.model, self.options = task, model, options
        self.train_set, self.validation_set = train_set, validation_set
        self.n_classes, self.device, self.transform = n_classes, torch.device(device), transform
        self.n_features = model.dim_encoded if options.get_encoded else model.dim_context
        in_run = "" if options.cpc_epoch is None else f" of CPC epoch {options.cpc_epoch}"
        self.name = f"{task} probe{in_run}"
        self.metric_name = "per" if options.ctc else "acc"
        self.criterion = self._build_classifier().to(self.device)
        trained = [self.criterion, model] if options.unfrozen else [self.criterion]
        self.optimizer = torch.optim.Adam(
            itertools.chain.from_iterable(module.parameters() for module in trained),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
        )
        self.logs = {"epoch": [], "iter": [], "saveStep": options.logging_step}
        self.best = None

    def seed(self, purpose):
        return self.options.seed, self.options.cpc_epoch, f"{self.task} probe", purpose

    def _build_classifier(self):
        """A new classifier, initialised without touching the global random generators."""
        options = self.options
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(*self.seed("initialisation")))
            if self.task == "speaker" and options.n_inner:
                return SpeakerDoubleCriterion(self.n_features, options.n_inner, self.n_classes)
            if self.task == "speaker":
                return SpeakerCriterion(self.n_features, self.n_classes, options.n_layers)
            kind = CTCPhoneCriterion if options.ctc else PhoneCriterion
            return kind(self.n_features, self.n_classes, options.get_encoded, options.n_layers)

    def run(self, after_epoch=lambda epoch: None):
        """Train for all epochs, calling `after_epoch(epoch)` after each. Returns a ProbeResult."""
        train_source = self._feature_source(self.train_set, training=True)
        validation_source = self._feature_source(self.validation_set, training=False)
        with progress(what=self.name, unit=" epochs", total=self.options.n_epochs) as bar:
            for epoch in range(self.options.n_epochs):
                training = self._train(train_source.batches(epoch))
                validation = self._validate(validation_source.batches(epoch))
                if epoch == 0:
                    self._describe_sets(training, validation)
                self._log(epoch, training, validation)
                bar.set_postfix_str(self._metric_text(self.best.metric))
                bar.update()
                after_epoch(epoch)
        return self._conclude()

    def _feature_source(self, dataset, *, training):
        """The features of a set: stored if the model is frozen and they fit in memory."""
        options = self.options
        build = functools.partial(WindowFeatures, self, dataset)
        if options.unfrozen:
            return build(training=training)
        frames = 1 if self.task == "speaker" else dataset.size_window // SAMPLES_PER_FRAME
        n_bytes = 4 * dataset.n_windows * frames * self.n_features
        storage = storage_for(n_bytes, self.device, options.max_stored_bytes)
        if storage is None:
            print(
                f"{self.name}: the features of the {dataset.title}, {n_bytes / 1e9:.1f} GB, don't "
                "fit in memory; they are recomputed in every epoch"
            )
            return build(training=training)
        batch_size = options.batch_size if training else VALIDATION_BATCH
        order_seed = self.seed("order") if training else None
        return StoredWindowFeatures(build(training=False), storage, batch_size, order_seed)

    def _train(self, batches):
        summary = PassSummary(self.n_classes)
        for features, label in batches:
            loss, accuracy = self.criterion.loss_and_accuracy(
                self.criterion.logits(features, features), label
            )
            self.optimizer.zero_grad()
            loss.sum().backward()
            self.optimizer.step()
            summary.add(loss, accuracy, label)
        return summary

    @torch.no_grad()
    def _validate(self, batches):
        summary = ValidationSummary(self.n_classes)
        for features, label in batches:
            logits = self.criterion.logits(features, features)
            summary.add(*self.criterion.loss_and_accuracy(logits, label), label)
            if self.options.ctc:
                summary.add_sequences(logits, label, self.criterion.blank)
            elif self.task == "phone" and self.n_classes <= MAX_CONFUSION_CLASSES:
                summary.add_confusion(logits, label)
        return summary

    def _log(self, epoch, training, validation):
        """Append the epoch to the logs, and keep its state if it is the best so far."""
        values = {
            "iter": training.n_batches,
            "locLoss_train": [training.loss],
            "locLoss_val": [validation.loss],
        }
        if self.options.ctc:
            metric, train_accuracy = validation.error_rate, None
            better = self.best is None or metric < self.best.metric
            values["PER_val"] = [metric]
        else:
            metric, train_accuracy = validation.accuracy, training.accuracy
            better = self.best is None or metric > self.best.metric
            values |= {"locAcc_train": [train_accuracy], "locAcc_val": [metric]}
        append_epoch(self.logs, epoch, values)
        if better:
            self.best = BestEpoch(
                epoch,
                metric,
                train_accuracy,
                validation.confusion,
                copy.deepcopy(self.criterion.state_dict()),
                copy.deepcopy(self.optimizer.state_dict()),
                self._model_state(),
            )

    def _model_state(self):
        """The model's state; copied only if training will change it."""
        state = self.model.state_dict()
        return copy.deepcopy(state) if self.options.unfrozen else state

    # ------------------------------------------------------------------------------- results

    def _describe_sets(self, training, validation):
        """Record and print the sets of the probe, and find its majority-class baseline."""
        seen_in_training = training.class_counts > 0
        unseen = validation.class_counts[~seen_in_training]
        majority_class = int(training.class_counts.argmax())
        if self.options.ctc:
            guesses = [[majority_class]] * len(validation.references)
            self.baseline = phone_error_rate(guesses, validation.references)
        else:
            self.baseline = int(validation.class_counts[majority_class]) / validation.n_frames
        self.measured_on = {
            "layer": layer_name(self.options.get_encoded, self.options.level),
            "dimensions": self.n_features,
            "training": self._set_sizes(self.train_set, training),
            "validation": self._set_sizes(self.validation_set, validation),
            "classes_only_in_validation": int(unseen.count_nonzero()),
            "share_only_in_validation": int(unseen.sum()) / validation.n_frames,
            "files_without_labels": self.train_set.n_unlabelled + self.validation_set.n_unlabelled,
        }
        print("\n".join(self._description()), flush=True)

    def _set_sizes(self, dataset, summary):
        return {
            "windows": summary.means.windows,
            "frames": summary.n_frames,
            "speakers": len({utterance.speaker for utterance in dataset.utterances}),
            "classes": int(summary.class_counts.count_nonzero()),
        }

    def _description(self):
        options, measured_on = self.options, self.measured_on
        n_unseen = measured_on["classes_only_in_validation"]
        yield (
            f"{self.name}: {measured_on['layer']} features, {measured_on['dimensions']} dimensions"
            + (", the last frame of each window" if self.task == "speaker" else "")
            + (", by CTC" if options.ctc else "")
        )
        n_layers = 2 if options.n_inner else options.n_layers
        yield (
            f"  classifier: {counted(n_layers, 'layer')}, trained for "
            f"{counted(options.n_epochs, 'epoch')} on batches of "
            f"{counted(options.batch_size, 'window')}, learning rate {options.learning_rate:g}"
        )
        for name in ("training", "validation"):
            part = measured_on[name]
            yield (
                f"  {name}: {counted(part['windows'], 'window')}, "
                f"{counted(part['frames'], 'frame')} of {counted(part['speakers'], 'speaker')}, "
                f"{part['classes']} of {counted(self.n_classes, self.task)}"
            )
        if n_unseen:
            yield (
                f"  only in validation, so never recognised: {counted(n_unseen, self.task)}, "
                f"{percent(measured_on['share_only_in_validation'])} of its frames"
            )
        if measured_on["files_without_labels"]:
            files = counted(measured_on["files_without_labels"], "file")
            yield f"  left out, without phone labels: {files}"

    def _metric_text(self, metric):
        return f"{'phone error rate' if self.options.ctc else 'accuracy'} {percent(metric)}"

    def _conclude(self):
        """Add the result to the logs, print it, and return it."""
        best, n_epochs = self.best, self.options.n_epochs
        training = "" if self.options.ctc else f" (training {percent(best.train_accuracy)})"
        print(
            f"{self.name}: {self._metric_text(best.metric)}{training} in epoch {best.epoch} (of 0 "
            f"to {n_epochs - 1}); majority {self.task} of the training set: "
            f"{percent(self.baseline)}",
            flush=True,
        )
        self._warn_if_nothing_was_learned()
        result = ProbeResult(
            self.task,
            self.metric_name,
            n_epochs,
            best.epoch,
            best.metric,
            best.train_accuracy,
            self.baseline,
            self.measured_on,
        )
        self.logs |= {
            "best_epoch": best.epoch,
            f"best_val_{self.metric_name}": best.metric,
            f"baseline_val_{self.metric_name}": self.baseline,
            "measured_on": self.measured_on,
        }
        if best.train_accuracy is not None:
            self.logs["best_train_acc"] = best.train_accuracy
        if best.confusion is not None:
            self.logs["class_accuracy"] = accuracy_by_class(best.confusion)
        return result

    def _warn_if_nothing_was_learned(self):
        """Warn of a result that is hardly better than always saying the majority class."""
        best, room = self.best.metric, self.baseline if self.options.ctc else 1 - self.baseline
        gain = self.baseline - best if self.options.ctc else best - self.baseline
        if self.n_classes > 1 and gain <= min(NEAR_MAJORITY, room / 2):
            labels = "labels of another corpus, or that begin at another time than the audio; "
            labels = labels if self.task == "phone" else ""
            print(
                f"warning: {self.name}: hardly better than always saying the majority "
                f"{self.task}. Likely causes: {labels}features that learned nothing; too low a "
                "learning rate of the probe, or too few epochs",
                flush=True,
            )

    def draw_confusion(self, path):
        """Draw the confusion matrix of the best classifier, if it labels single frames.

        Otherwise delete the picture that another probe may have left at `path`.
        """
        if self.best.confusion is None:
            path.unlink(missing_ok=True)
            return
        title = f"{self.name}: {self._metric_text(self.best.metric)}"
        symbols = symbols_beside(self.validation_set.phone_labels.path, self.n_classes)
        draw_confusion(self.best.confusion.cpu(), path, title, symbols)


def accuracy_by_class(confusion):
    """{class: {"accuracy", "frames"}} of the classes that occur; confusion: [true, predicted]."""
    frames = confusion.sum(dim=1)
    right = confusion.diag()
    return {
        str(c): {"accuracy": right[c].item() / frames[c].item(), "frames": frames[c].item()}
        for c in frames.nonzero().flatten().tolist()
    }
