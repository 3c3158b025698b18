"""Phone recognition on whole utterances: how well features transfer to another language.

    python eval/common_voices_eval.py train AUDIO PHONES CHECKPOINT.pt --freeze --output OUT
    python eval/common_voices_eval.py train AUDIO PHONES CHECKPOINT.pt --LSTM --output OUT
    python eval/common_voices_eval.py per OUT --pathVal LIST

`train` trains a CTC phone recogniser on the contexts of a model, which is frozen with --freeze and
fine-tuned otherwise; `per` measures the phone error rate (Riviere et al., "Unsupervised pretraining
transfers well across languages", 2020). PHONES holds one utterance per line: its name and its
phones, as integers from 0.

OUT holds `args_training.json`, `logs_train.txt` and `checkpoint.pt` of the epoch with the lowest
validation loss; `per` adds `args_validation_<name>.json` and `logs_per_<name>.txt`.
"""

import argparse
import math
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

from criterion.seq_alignment import best_label_sequences, phone_error_rate
from eval.utterances import UtteranceSet, features_of
from feature_loader import load_model, shortest_input
from utils.data.corpus import labels_by_path, listed_utterances, scan_corpus
from utils.data.labels import read_phone_labels
from utils.files import load_json, load_tensors, save_json, save_tensors, writing_to
from utils.misc import SAMPLES_PER_FRAME, UserError, generator_from, percent
from utils.run.checkpoint import load_weights, open_checkpoint
from utils.run.command import CommandLine, at_least, command, extension
from utils.run.console import progress
from utils.run.machine import device_from, prepare_device
from utils.run.shared_flags import add_adam, add_device, add_extension, add_reading

BEAM = 20  # phone sequences kept in decoding
VALIDATION_FRACTION = 0.1  # of the utterances, without a list
N_DEBUG = {"training set": 1000, "validation set": 100}  # utterances with --debug
PARALLEL = "module."  # prefix of keys: the original saves the state of DataParallel


@command
def main(argv=None):
    args = parse_arguments(argv)
    prepare_device(args.device)
    if args.command == "train":
        train(args)
    else:
        measure_error_rate(args)


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = build_parser().parse_args(argv)
    for name in ("output", "pathDB", "pathPhone", "pathTrain", "pathVal"):
        if vars(args).get(name) is not None:
            setattr(args, name, os.path.abspath(vars(args)[name]))
    if args.command == "train":
        if args.in_dim != 1:
            raise UserError(
                f"--in_dim {args.in_dim}: models take waveforms, which have one dimension; "
                "precomputed features can't be used"
            )
        args.pathCheckpoint = os.path.abspath(open_checkpoint(args.pathCheckpoint).path)
    elif os.path.basename(args.name) != args.name:
        raise UserError(f"--name {args.name}: must be a name without folders")
    return args


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="common_voices_eval.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    training = commands.add_parser("train", help="train a phone recogniser")
    add_training_flags(training.add_argument)
    add_machine_flags(training.add_argument)
    measuring = commands.add_parser("per", help="phone error rate of a trained recogniser")
    add_measuring_flags(measuring.add_argument)
    add_machine_flags(measuring.add_argument)
    return parser


def add_training_flags(add):
    add("pathDB", help="root of the audio")
    add("pathPhone", help="phones of the utterances, one per line: `name phone phone ...`")
    add("pathCheckpoint", help="CPC checkpoint, or a run's directory for the newest in it")
    add("-o", "--output", default="out", metavar="DIR", help="where results go")
    add("--pathTrain", metavar="FILE", help="names of the utterances to train on (default: all)")
    add("--pathVal", metavar="FILE", help="names of the utterances to validate on (default: a "
        "tenth is set aside)")
    add_extension(add)
    add("--freeze", action="store_true", help="train only the classifier, not the model")
    add("--no_pretraining", action="store_true", help="start from random weights of the model")
    add("--LSTM", action="store_true", help="an LSTM between the features and the classifier")
    add("--seqNorm", action="store_true",
        help="normalise features to zero mean and unit variance over each utterance")
    add("--dropout", action="store_true", help="drop half of the features in training")
    add("--kernelSize", type=at_least(1), default=8, metavar="FRAMES", help="frames that each "
        "output sees; outputs are spaced by half of that")
    add("--loss_reduction", choices=["mean", "sum"], default="mean", help="of the loss of a batch; "
        "mean: per phone and utterance")
    add("--in_dim", type=int, default=1, help="only 1: models take waveforms")
    add("--nEpochs", type=at_least(1), default=30, metavar="N", help="epochs")
    add_adam(add, epsilon=1e-8)


def add_measuring_flags(add):
    add("output", help="the --output of training")
    add("--pathDB", metavar="DIR", help="root of the audio (default: as in training)")
    add("--pathPhone", metavar="FILE", help="phones of the utterances (default: as in training)")
    add("--pathVal", metavar="FILE", help="names of the utterances (default: the validation set of "
        "training; with another --pathDB or --pathPhone, all)")
    add("--file_extension", type=extension, metavar="EXT",
        help="of the audio files (default: as in training)")
    add("--name", default="0", help="part of the names of the result files")


def add_machine_flags(add):
    add("--batchSize", type=at_least(1), default=8, metavar="N", help="utterances per batch")
    add("--max_bad_files", type=float, default=0.01, metavar="FRACTION",
        help="stop if more than this fraction of the files is undecodable")
    add_reading(add)
    add_device(add)


# fmt: on
# --------------------------------------------------------------------------------- classifier


class CTCPhoneRecognizer(nn.Module):
    """CTC phone recogniser on features: a convolution, optionally after an LSTM.

    Outputs are spaced by half of the kernel; the last class is the blank. No output sees the
    padding after an utterance.
    """

    def __init__(
        self, n_features, n_phones, kernel_size=8, *, lstm=False, seq_norm=False, dropout=False
    ):
        super().__init__()
        self.blank = n_phones
        self.uses_lstm, self.seq_norm, self.dropout = lstm, seq_norm, dropout
        self.conv1 = nn.LSTM(n_features, n_features, batch_first=True)  # always in the state
        self.PhoneCriterionClassifier = nn.Conv1d(
            n_features, n_phones + 1, kernel_size, stride=max(1, kernel_size // 2)
        )

    @property
    def kernel_size(self):
        return self.PhoneCriterionClassifier.kernel_size[0]

    def n_outputs(self, n_frames):
        """The number of outputs for utterances of n_frames, (B,) int64."""
        return (n_frames - self.kernel_size) // self.PhoneCriterionClassifier.stride[0] + 1

    def forward(self, features, n_frames):
        """features (B, S, D) with n_frames (B,) valid -> logits (B, S', n_phones + 1)."""
        if self.seq_norm:
            features = normalize_over_time(features, n_frames)
        if self.uses_lstm:
            features, _ = self.conv1(features)
        features = features.transpose(1, 2)
        if self.dropout:
            features = F.dropout1d(features, 0.5, self.training)
        return self.PhoneCriterionClassifier(features).transpose(1, 2)

    def loss(self, batch, reduction):
        """CTC loss of an `UtteranceBatch` of features, a scalar.

        Utterances with more phones than outputs count 0.
        """
        return F.ctc_loss(
            self(batch.values, batch.n_frames).log_softmax(dim=2).transpose(0, 1),
            batch.phones,
            self.n_outputs(batch.n_frames),
            batch.n_phones,
            blank=self.blank,
            reduction=reduction,
            zero_infinity=True,
        )


def normalize_over_time(features, n_frames):
    """Normalise (B, S, D) to zero mean and unit variance over the first n_frames (B,) of each row.

    Later frames become 0.
    """
    counts = torch.arange(features.size(1), device=features.device) < n_frames[:, None]
    counts, n = counts[:, :, None], n_frames[:, None, None]
    centred = (features - (features * counts).sum(1, keepdim=True) / n) * counts
    variance = centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
    return centred / torch.sqrt(variance + 1e-8)


# -------------------------------------------------------------------------------- the audio


def list_utterances(args):
    """The corpus and the phones of its utterances."""
    corpus = scan_corpus(
        args.pathDB,
        args.file_extension,
        ignore_cache=args.ignore_cache,
        n_threads=args.n_process_loader,
    )
    args.file_extension = corpus.extension
    return corpus, read_phone_labels(args.pathPhone)


def choose_utterances(args, corpus, labels):
    """Two lists of utterances, for training and for validation; they depend only on the flags."""
    training = listed_utterances(corpus, args.pathTrain)
    if args.pathVal:
        validation = listed_utterances(corpus, args.pathVal)
        if args.pathTrain:
            return training, validation
    else:
        phones = labels_by_path(labels, training, corpus)
        labelled = [u for u in training if u.path in phones]
        if len(labelled) == 1:
            raise UserError("--pathVal is needed: one utterance can't be split into two sets")
        generator = generator_from(args.random_seed, "validation set")
        order = torch.randperm(len(labelled), generator=generator).tolist()
        validation = [labelled[i] for i in order[: math.ceil(VALIDATION_FRACTION * len(labelled))]]
    chosen = set(validation)
    return [u for u in training if u not in chosen], validation


def build_set(args, corpus, chosen, labels, recognizer, model, title):
    """An `UtteranceSet` of the chosen utterances that are long enough; prints a summary of it."""
    utterances = UtteranceSet(
        corpus,
        chosen[: N_DEBUG[title]] if args.debug else chosen,
        labels,
        max(SAMPLES_PER_FRAME * recognizer.kernel_size, shortest_input(model)),
        n_threads=args.n_process_loader,
        max_bad_files=args.max_bad_files,
        title=title,
    )
    print(utterances.describe(), flush=True)
    return utterances


def check_pace(utterances, recognizer, labels_path):
    """Warn of utterances with more phones than CTC can output; raise UserError if all have."""
    n_outputs = recognizer.n_outputs(utterances.n_frames()).tolist()
    too_many = 0
    for utterance, available in zip(utterances.utterances, n_outputs, strict=True):
        repeats = int((utterance.phones[1:] == utterance.phones[:-1]).sum())
        too_many += len(utterance.phones) + repeats > available
    if too_many == len(utterances):
        raise UserError(
            f"{labels_path}: every utterance of the {utterances.title} has more phones than the "
            "classifier has outputs. List a phone once for each time it is spoken, not for each "
            "frame; a smaller --kernelSize gives more outputs"
        )
    if too_many:
        print(
            f"{utterances.title}: {too_many} of {len(utterances)} utterances have more phones than "
            "the classifier has outputs, so their loss is 0; a smaller --kernelSize gives more"
        )


# ----------------------------------------------------------------------------------- training


def train(args):
    """Train a classifier, and the model unless it is frozen; save the best epoch."""
    torch.manual_seed(args.random_seed)
    device = device_from(args.device)
    corpus, labels = list_utterances(args)
    model, *_ = load_model([args.pathCheckpoint], load_weights=not args.no_pretraining)
    recognizer = CTCPhoneRecognizer(
        model.dim_context,
        labels.n_phones,
        args.kernelSize,
        lstm=args.LSTM,
        seq_norm=args.seqNorm,
        dropout=args.dropout,
    )
    sets = []
    for chosen, title in zip(choose_utterances(args, corpus, labels), N_DEBUG, strict=True):
        sets.append(build_set(args, corpus, chosen, labels, recognizer, model, title))
        check_pace(sets[-1], recognizer, args.pathPhone)
    with writing_to(args.output, "--output"):
        Path(args.output).mkdir(parents=True, exist_ok=True)
        save_json(Path(args.output, "args_training.json"), vars(args))
        run_epochs(args, sets, model.to(device), recognizer.to(device), device)


def run_epochs(args, sets, model, recognizer, device):
    """Loop over epochs; writes the log and the checkpoint of the best epoch."""
    model.requires_grad_(not args.freeze).eval()
    training, validation = (
        features_of(utterances, model, device, args.batchSize, frozen=args.freeze)
        for utterances in sets
    )
    trained = [recognizer] if args.freeze else [recognizer, model]
    optimizer = torch.optim.Adam(
        [parameter for network in trained for parameter in network.parameters()],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.epsilon,
    )
    best = math.inf
    with open(Path(args.output, "logs_train.txt"), "w", encoding="utf-8") as log:
        for epoch in range(args.nEpochs):
            for network in trained:
                network.train()
            generator = generator_from(args.random_seed, epoch, "utterances")
            batches = training.batches(args.batchSize, generator)
            loss = mean_loss(f"epoch {epoch}", batches, len(sets[0]), recognizer, args, optimizer)
            for network in trained:
                network.eval()
            batches = validation.batches(args.batchSize)
            what = f"epoch {epoch}: validation"
            validation_loss = mean_loss(what, batches, len(sets[1]), recognizer, args)
            line = f"epoch {epoch}  training loss {loss:.4f}  validation loss {validation_loss:.4f}"
            if validation_loss < best:
                best = validation_loss
                save_best(args, recognizer, model, best)
                line += "  best so far"
            print(line, flush=True)
            print(line, file=log, flush=True)
    print(f"best validation loss {best:.4f}: {Path(args.output, 'checkpoint.pt')}")


def mean_loss(what, batches, total, recognizer, args, optimizer=None):
    """The mean loss per utterance of one pass; with an optimiser, of a training pass.

    Raises UserError if it isn't a finite number.
    """
    summed, n_utterances = 0.0, 0
    with (
        torch.set_grad_enabled(optimizer is not None),
        progress(what=what, unit=" utterances", total=total) as bar,
    ):
        for batch in batches:
            loss = recognizer.loss(batch, args.loss_reduction)
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            size = len(batch.utterances)
            summed = summed + loss.detach() * (size if args.loss_reduction == "mean" else 1)
            n_utterances += size
            bar.update(size)
    mean = float(summed) / n_utterances
    if not math.isfinite(mean):
        raise UserError(f"{what}: the loss isn't a finite number; lower --lr")
    return mean


def save_best(args, recognizer, model, loss):
    state = {
        "classifier": {PARALLEL + key: value for key, value in recognizer.state_dict().items()},
        "model": {PARALLEL + key: value for key, value in model.state_dict().items()},
        "bestLoss": loss,
    }
    save_tensors(Path(args.output, "checkpoint.pt"), state)


# --------------------------------------------------------------------------- phone error rate


def measure_error_rate(args):
    """Print and write the phone error rate of the recogniser that `train` left in a directory."""
    device = device_from(args.device)
    trained = trained_arguments(args)
    model, recognizer = load_trained(Path(args.output, "checkpoint.pt"), trained)
    corpus, labels = list_utterances(trained)
    if args.pathVal or args.pathDB or args.pathPhone:
        chosen = listed_utterances(corpus, args.pathVal)
    else:
        _, chosen = choose_utterances(trained, corpus, labels)
    title = "validation set"
    utterances = build_set(args, corpus, chosen, labels, recognizer, model, title)
    features = features_of(
        utterances, model.to(device).eval(), device, args.batchSize, frozen=False
    )
    results = recognize(
        features.batches(args.batchSize), recognizer.to(device).eval(), len(utterances)
    )
    rates = [rate for rate, *_ in results]
    deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
    summary = (
        f"phone error rate {percent(statistics.mean(rates))}, standard deviation "
        f"{percent(deviation)} over {len(rates)} utterances"
    )
    print(summary)
    write_results(args, trained, summary, results)


def trained_arguments(args):
    """The flags of training, overridden by those of this command line."""
    path = Path(args.output, "args_training.json")
    if not path.is_file():
        raise UserError(
            f"{args.output}: nothing was trained there (no {path.name}); run `train` first"
        )
    stored = load_json(path)
    needed = {"pathDB", "pathPhone", "pathCheckpoint"}
    if not isinstance(stored, dict) or not needed <= stored.keys():
        raise UserError(f"{path}: not written by `train`: it lacks {', '.join(sorted(needed))}")
    defaults = vars(build_parser().parse_args(["train", "-", "-", "-"]))
    explicit = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**defaults, **stored, **explicit})


def load_trained(path, trained):
    """The model and the classifier in a checkpoint of `train`."""
    state = load_tensors(path)
    try:
        weights, classifier = (
            {key.removeprefix(PARALLEL): value for key, value in state[part].items()}
            for part in ("model", "classifier")
        )
        n_outputs, n_features, kernel_size = classifier["PhoneCriterionClassifier.weight"].shape
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: isn't a checkpoint of `train`") from error
    model, *_ = load_model([trained.pathCheckpoint], load_weights=False)
    recognizer = CTCPhoneRecognizer(
        n_features, n_outputs - 1, kernel_size, lstm=trained.LSTM, seq_norm=trained.seqNorm
    )
    load_weights(model, weights, path)
    load_weights(recognizer, classifier, path)
    return model, recognizer


@torch.no_grad()
def recognize(batches, recognizer, total):
    """(phone error rate, path, phones) of each utterance."""
    results = []
    with progress(what="recognising phones", unit=" utterances", total=total) as bar:
        for batch in batches:
            probabilities = recognizer(batch.values, batch.n_frames).softmax(dim=2)
            lengths = recognizer.n_outputs(batch.n_frames)
            found = best_label_sequences(probabilities, recognizer.blank, BEAM, lengths)
            for utterance, phones in zip(batch.utterances, found, strict=True):
                rate = phone_error_rate([phones], [utterance.phones.tolist()])
                results.append((rate, utterance.path, phones))
            bar.update(len(found))
    return sorted(results, key=lambda result: result[1])


def write_results(args, trained, summary, results):
    lines = [
        f"{path}  {percent(rate)}  {' '.join(map(str, phones))}" for rate, path, phones in results
    ]
    with writing_to(args.output):
        save_json(Path(args.output, f"args_validation_{args.name}.json"), vars(trained))
        Path(args.output, f"logs_per_{args.name}.txt").write_text("\n".join([summary, *lines, ""]))


if __name__ == "__main__":
    main()
