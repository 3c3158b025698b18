"""Probes: a small classifier of phones or speakers, trained on the features of a model.

Training runs call `run_probe`; eval/linear_separability.py is the command for a finished model. The
features of a frozen model are computed once and stored if they fit in memory.
"""

import copy
import dataclasses
import functools
import itertools
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from criterion.classification import (
    CTCPhoneCriterion,
    PhoneCriterion,
    SpeakerCriterion,
    SpeakerDoubleCriterion,
)
from criterion.seq_alignment import phone_error_rate
from eval.knn import knn_accuracies
from eval.probe_features import StoredWindowFeatures, WindowFeatures, storage_for
from eval.probe_summary import PassSummary, ValidationSummary, accuracies
from segments import layer_name
from utils.data.labels import symbols_beside
from utils.files import remove_leftovers, save_json, save_tensors, writing_to
from utils.misc import SAMPLES_PER_FRAME, counted, generator_from, percent, seed_from
from utils.report.plot_confusion import draw_confusion
from utils.run.console import progress
from utils.run.logs import append_epoch

MAX_CONFUSION_CLASSES = 1000  # with more classes, confusions aren't counted
NEAR_MAJORITY = 0.02  # of the frames: a probe no better than its majority class by more than this
VALIDATION_BATCH = 64  # windows in a batch of stored features


class ProbeResult(NamedTuple):
    """The result of a probe. `metric` is the validation accuracy of its best epoch, or with CTC the
    phone error rate (`metric_name` is "acc" or "per"); `train_accuracy` is None with CTC. Of
    several classifiers these are means, and `spread` is the standard deviation of the metric.
    `baseline` is the metric of always predicting the majority class of the training set; `knn` the
    accuracy by k nearest neighbours, for each k."""

    task: str
    metric_name: str
    epochs_trained: int
    best_epoch: int
    metric: float
    train_accuracy: float | None
    baseline: float
    measured_on: dict
    spread: float | None = None
    knn: dict = {}

    def logged(self):
        """The values for the log of a training run."""
        values = {
            "num_epoch_trained": self.epochs_trained,
            f"best_val_{self.metric_name}": [self.metric],
            f"baseline_val_{self.metric_name}": [self.baseline],
        }
        if self.train_accuracy is not None:
            values["best_train_acc"] = [self.train_accuracy]
        if self.spread is not None:
            values[f"best_val_{self.metric_name}_std"] = [self.spread]
        values |= {f"knn_{k}_val_acc": [accuracy] for k, accuracy in self.knn.items()}
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


class BestEpoch(NamedTuple):
    """The metric and all states after the best epoch of a probe."""

    epoch: int
    metric: float
    train_accuracy: float | None  # None with CTC
    validation: ValidationSummary
    classifier: dict
    optimizer: dict
    model: dict

    @property
    def confusion(self):
        return self.validation.confusion


class Probe:
    """A classifier of the features of a model, and its training.

    After each epoch `logs` holds lists over the epochs, with the keys of `checkpoint_logs.json`,
    and `best` the best epoch so far. `transform` is applied to the features, (B, S, D), and gives
    `n_features` dimensions, those of units (default: D, of features).
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
        n_features=None,
    ):
        self.task, self.model, self.options = task, model, options
        self.train_set, self.validation_set = train_set, validation_set
        self.n_classes, self.device, self.transform = n_classes, torch.device(device), transform
        of_model = model.dim_encoded if options.get_encoded else model.dim_context
        self.n_features = n_features or of_model
        self.layer = layer_name(options.get_encoded, options.level)
        if n_features:
            self.layer = f"units of {self.layer}"
        in_run = "" if options.cpc_epoch is None else f" of CPC epoch {options.cpc_epoch}"
        self.name = f"{task} probe{in_run}"
        self.metric_name = "per" if options.ctc else "acc"
        self._begin()

    def _begin(self):
        """A new classifier, as `options` say, and empty logs."""
        options = self.options
        self.criterion = self._build_classifier().to(self.device)
        trained = [self.criterion, self.model] if options.unfrozen else [self.criterion]
        self.optimizer = torch.optim.Adam(
            itertools.chain.from_iterable(module.parameters() for module in trained),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
        )
        self.logs = {"epoch": [], "iter": [], "saveStep": options.logging_step}
        self.best = None

    def seed(self, purpose):
        again = (self.options.repetition,) if self.options.repetition else ()
        return self.options.seed, self.options.cpc_epoch, f"{self.task} probe", purpose, *again

    def _build_classifier(self):
        """A new classifier, initialised without touching the global random generators."""
        options, n_features = self.options, self.n_features
        n_layers, n_hidden = (2, options.n_hidden) if options.n_hidden else (options.n_layers, None)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(*self.seed("initialisation")))
            if self.task == "speaker" and options.n_inner:
                return SpeakerDoubleCriterion(n_features, options.n_inner, self.n_classes)
            if self.task == "speaker":
                return SpeakerCriterion(n_features, self.n_classes, n_layers, n_hidden)
            kind = CTCPhoneCriterion if options.ctc else PhoneCriterion
            return kind(n_features, self.n_classes, options.get_encoded, n_layers, n_hidden)

    def run(self, after_epoch=lambda epoch: None):
        """Train for all epochs, calling `after_epoch(epoch)` after each. Returns a ProbeResult.

        Further classifiers are trained where `options` ask for several; logs and `best` are those
        of the first.
        """
        training = self._feature_source(self.train_set, training=True)
        validation = self._feature_source(self.validation_set, training=False)
        self._fit(training, validation, after_epoch)
        others = [self._repeat(i, training, validation) for i in range(1, self.options.n_times)]
        if self.options.knn:
            generator = generator_from(*self.seed("nearest neighbours"))
            names = self.train_set.speaker_names
            knn = knn_accuracies(training, validation, self.options.knn, names, generator)
            self.logs["knn"] = knn | {"majority_class": self.baseline}
        return self._conclude([self.best, *others])

    def _fit(self, train_source, validation_source, after_epoch=lambda epoch: None):
        options = self.options
        with progress(what=self.name, unit=" epochs", total=options.n_epochs) as bar:
            for epoch in range(options.n_epochs):
                order = options.repetition * options.n_epochs + epoch
                training = self._train(train_source.batches(order))
                validation = self._validate(validation_source.batches(epoch))
                if epoch == 0 and not options.repetition:
                    self._describe_sets(training, validation)
                self._log(epoch, training, validation)
                bar.set_postfix_str(self._metric_text(self.best.metric))
                bar.update()
                after_epoch(epoch)

    def _repeat(self, repetition, *sources):
        """The best epoch of another classifier on the same features."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, repetition=repetition)
        other._begin()
        other._fit(*sources)
        return other.best

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
        for features, label, _ in batches:
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
        n_speakers = len(self.validation_set.speaker_names) if self.task == "phone" else 1
        summary = ValidationSummary(self.n_classes, n_speakers)
        for features, label, speaker in batches:
            logits = self.criterion.logits(features, features)
            summary.add(*self.criterion.loss_and_accuracy(logits, label), label)
            if self.options.ctc:
                summary.add_sequences(logits, label, self.criterion.blank)
                continue
            summary.add_right(logits, label, speaker)
            if self.task == "phone" and self.n_classes <= MAX_CONFUSION_CLASSES:
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
                validation,
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
        self.majority = majority_class = int(training.class_counts.argmax())
        if self.options.ctc:
            guesses = [[majority_class]] * len(validation.references)
            self.baseline = phone_error_rate(guesses, validation.references)
        else:
            self.baseline = int(validation.class_counts[majority_class]) / validation.n_frames
        self.measured_on = {
            "layer": self.layer,
            "dimensions": self.n_features,
            "training": self._set_sizes(self.train_set, training),
            "validation": self._set_sizes(self.validation_set, validation),
            "classes_only_in_validation": int(unseen.count_nonzero()),
            "share_only_in_validation": int(unseen.sum()) / validation.n_frames,
            "files_without_labels": self.train_set.n_unlabelled + self.validation_set.n_unlabelled,
        }
        if self.options.feature_norm != "none":
            self.measured_on["feature_norm"] = self.options.feature_norm
        print("\n".join(self._description()), flush=True)

    def _set_sizes(self, dataset, summary):
        return {
            "windows": summary.means.windows,
            "frames": summary.n_frames,
            "speakers": len({utterance.speaker for utterance in dataset.utterances}),
            "classes": int(summary.class_counts.count_nonzero()),
        }

    def _description(self):
        options, measured_on, norm = self.options, self.measured_on, self.options.feature_norm
        n_unseen = measured_on["classes_only_in_validation"]
        yield (
            f"{self.name}: {measured_on['layer']} features, {measured_on['dimensions']} dimensions"
            + (", the last frame of each window" if self.task == "speaker" else "")
            + (", by CTC" if options.ctc else "")
            + (f", each {norm} of mean 0, variance 1" if norm != "none" else "")
        )
        hidden = f" ({counted(options.n_hidden, 'hidden unit')})" if options.n_hidden else ""
        n_layers = 2 if options.n_inner or options.n_hidden else options.n_layers
        yield (
            f"  classifier: {counted(n_layers, 'layer')}{hidden}, trained for "
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

    def _conclude(self, bests):
        """Add the result to the logs, print it, and return it; bests: of each classifier."""
        result = self._result(bests)
        best, several = self.best, len(bests) > 1
        spread = f" ± {percent(result.spread)} ({len(bests)} classifiers)" if several else ""
        training = "" if self.options.ctc else f" (training {percent(result.train_accuracy)})"
        when = f" in epoch {best.epoch} (of 0 to {self.options.n_epochs - 1})"
        print(
            f"{self.name}: {self._metric_text(result.metric)}{spread}{training}"
            f"{'' if several else when}; always the majority {self.task} of the training set: "
            f"{percent(self.baseline)}",
            flush=True,
        )
        for k, accuracy in result.knn.items():
            print(f"  {counted(int(k), 'nearest neighbour')}: accuracy {percent(accuracy)}")
        self._warn_if_nothing_was_learned()
        name = f"best_val_{self.metric_name}"
        self.logs |= {
            "best_epoch": best.epoch,
            name: result.metric,
            f"baseline_val_{self.metric_name}": self.baseline,
            "measured_on": self.measured_on,
        }
        if several:
            self.logs |= {f"{name}_std": result.spread, f"{name}_each": [b.metric for b in bests]}
        if not self.options.ctc:
            self.logs["best_train_acc"] = result.train_accuracy
            self._log_accuracies(best.validation)
        return result

    def _result(self, bests):
        return ProbeResult(
            self.task,
            self.metric_name,
            self.options.n_epochs,
            self.best.epoch,
            statistics.fmean(best.metric for best in bests),
            None if self.options.ctc else statistics.fmean(best.train_accuracy for best in bests),
            self.baseline,
            self.measured_on,
            statistics.stdev(best.metric for best in bests) if len(bests) > 1 else None,
            self.logs.get("knn", {}).get("val_acc", {}),
        )

    def _log_accuracies(self, validation):
        """Accuracies by class and, of phones, by speaker."""
        frames, right = validation.frames, validation.right
        names = self.validation_set.speaker_names
        classes = [str(c) for c in range(self.n_classes)] if self.task == "phone" else names
        self.logs["class_accuracy"] = accuracies(right.sum(dim=0), frames.sum(dim=0), classes)
        if self.task == "phone":
            sums = right.sum(dim=1), frames.sum(dim=1), names, frames[:, self.majority]
            self.logs["speaker_accuracy"] = accuracies(*sums)

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
