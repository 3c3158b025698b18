"""Phone recognition on whole utterances: how well features carry over to another language.

    python eval/common_voices_eval.py train AUDIO PHONES CHECKPOINT.pt --freeze --output OUT
    python eval/common_voices_eval.py train AUDIO PHONES CHECKPOINT.pt --LSTM --output OUT
    python eval/common_voices_eval.py per OUT [--pathVal LIST]

`train` learns to write down the phones of utterances by CTC, from the contexts of a frozen model
or, without --freeze, together with the model; `per` measures the phone error rate (Riviere et al.,
"Unsupervised pretraining transfers well across languages", 2020). PHONES has a line for each
utterance: its name and the phones that are said in it, as numbers from 0.

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

import torch
import torch.nn.functional as F
from torch import nn

from criterion.seq_alignment import best_label_sequences, phone_error_rate
from eval.utterances import UtteranceSet, features_of
from feature_loader import load_model, shortest_input
from utils.data.corpus import read_utterance_list, scan_corpus, select_utterances
from utils.data.labels import read_phone_labels
from utils.files import load_json, load_tensors, save_json, save_tensors
from utils.misc import SAMPLES_PER_FRAME, UserError, generator_from
from utils.run.checkpoint import load_weights, open_checkpoint
from utils.run.command import CommandLine, command
from utils.run.console import progress
from utils.run.logs import percent
from utils.run.machine import device_from, keep_freed_memory

BEAM = 20  # phone sequences kept while outputs are decoded
VALIDATION_SHARE = 0.1  # of the utterances, where there is no list of them
N_DEBUG = {"training set": 1000, "validation set": 100}  # utterances with --debug
PARALLEL = "module."  # in front of keys: the original keeps the state of data-parallel networks


@command
def main(argv=None):
    args = parse_arguments(argv)
    keep_freed_memory()
    if args.command == "train":
        train(args)
    else:
        measure_error_rate(args)


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked, paths made absolute. Raises UserError with the flag and the cure."""
    args = build_parser().parse_args(argv)
    for name in ("output", "pathDB", "pathPhone", "pathTrain", "pathVal"):
        if vars(args).get(name) is not None:
            setattr(args, name, os.path.abspath(vars(args)[name]))
    for name in ("batchSize", "n_process_loader"):
        refuse_if(getattr(args, name) < 1, f"--{name} {getattr(args, name)}: must be at least 1")
    if args.command == "train":
        check_training(args)
    else:
        refuse_if(os.path.basename(args.name) != args.name, f"--name {args.name}: isn't a name")
    return args


def check_training(args):
    for name in ("nEpochs", "kernelSize"):
        refuse_if(getattr(args, name) < 1, f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("lr", "epsilon"):
        refuse_if(not getattr(args, name) > 0, f"--{name} {getattr(args, name)}: must be above 0")
    for name in ("beta1", "beta2"):
        value = getattr(args, name)
        refuse_if(not 0 <= value < 1, f"--{name} {value}: must be in [0, 1)")
    refuse_if(
        args.in_dim != 1,
        f"--in_dim {args.in_dim}: models take waveforms here, which have one dimension; "
        "precomputed features can't be used",
    )
    args.pathCheckpoint = os.path.abspath(open_checkpoint(args.pathCheckpoint).path)


def refuse_if(condition, message):
    if condition:
        raise UserError(message)


# A flag in two lines reads better than in seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(
        prog="common_voices_eval.py", description="Phone recognition on whole utterances."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandLine)
    training = commands.add_parser("train", help="learn to recognise phones")
    add_training_flags(training)
    add_machine_flags(training)
    measuring = commands.add_parser("per", help="phone error rate of what was trained")
    add_measuring_flags(measuring)
    add_machine_flags(measuring)
    return parser


def add_training_flags(parser):
    add = parser.add_argument
    add("pathDB", help="root of the audio")
    add("pathPhone", help="phones of the utterances, `name phone phone ...` a line")
    add("pathCheckpoint", help="CPC checkpoint, or a run's directory for the newest in it")
    add("-o", "--output", default="out", metavar="DIR", help="where results go (default: out)")
    add("--pathTrain", metavar="FILE", help="names of the utterances to train on (default: all)")
    add("--pathVal", metavar="FILE", help="names of the utterances to validate on (default: a "
        "tenth is set aside)")
    add("--file_extension", default=".mp3", metavar="EXT", help="end of the audio "
        "files' names (default: .mp3)")
    add("--freeze", action="store_true", help="train the classifier alone, not the model")
    add("--no_pretraining", action="store_true", help="begin with random weights of the model")
    add("--LSTM", action="store_true", help="an LSTM between the features and the classifier")
    add("--seqNorm", action="store_true", help="features with zero mean and unit variance over "
        "each utterance")
    add("--dropout", action="store_true", help="drop half of the features while training")
    add("--kernelSize", type=int, default=8, metavar="FRAMES", help="frames that an output sees; "
        "there is an output for every half of that (default: 8)")
    add("--loss_reduction", choices=["mean", "sum"], default="mean", help="loss of a batch; mean: "
        "by phone and utterance (default: mean)")
    add("--in_dim", type=int, default=1, help="refused but for 1: models take waveforms")
    add("--nEpochs", type=int, default=30, metavar="N", help="epochs of training (default: 30)")
    add("--lr", type=float, default=2e-4, help="Adam's learning rate (default: 2e-4)")
    add("--beta1", type=float, default=0.9, help="Adam's beta 1 (default: 0.9)")
    add("--beta2", type=float, default=0.999, help="Adam's beta 2 (default: 0.999)")
    add("--epsilon", type=float, default=1e-8, help="Adam's epsilon (default: 1e-8)")
    add("--random_seed", type=int, default=0, metavar="SEED", help="of everything "
        "random (default: 0)")


def add_measuring_flags(parser):
    add = parser.add_argument
    add("output", help="the --output of training")
    add("--pathDB", metavar="DIR", help="root of the audio (default: as in training)")
    add("--pathPhone", metavar="FILE", help="phones of the utterances (default: as in training)")
    add("--pathVal", metavar="FILE", help="names of the utterances (default: those that training "
        "was validated on; with another --pathDB or --pathPhone, all)")
    add("--file_extension", metavar="EXT", help="of the audio files (default: as in training)")
    add("--name", default="0", help="of this measurement, a part of its files' names (default: 0)")


def add_machine_flags(parser):
    add = parser.add_argument
    add("--batchSize", type=int, default=8, metavar="N", help="utterances in a batch (default: 8)")
    add("--debug", action="store_true", help="use the first 1000 utterances for training, the "
        "first 100 for validation")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"],
        help="auto: CUDA where there is one (default: auto)")
    add("--n_process_loader", type=int, default=8, metavar="N", help="threads that decode audio "
        "(default: 8)")
    add("--max_bad_files", type=float, default=0.01, metavar="SHARE",
        help="stop when more than this share of the files can't be decoded (default: 0.01)")
    add("--ignore_cache", action="store_true",
        help="list the audio files anew; needed when files were added or removed")


# fmt: on
# --------------------------------------------------------------------------------- classifier


class CTCPhoneRecognizer(nn.Module):
    """Phone sequences from features by CTC: a convolution, optionally an LSTM before it.

    Outputs are spaced by half of the kernel; the last class is the blank. None of them sees
    anything of the padding after an utterance.
    """

    def __init__(
        self, n_features, n_phones, kernel_size=8, *, lstm=False, seq_norm=False, dropout=False
    ):
        super().__init__()
        self.blank = n_phones
        self.uses_lstm, self.seq_norm, self.dropout = lstm, seq_norm, dropout
        self.conv1 = nn.LSTM(n_features, n_features, batch_first=True)  # in any case in the state
        self.PhoneCriterionClassifier = nn.Conv1d(
            n_features, n_phones + 1, kernel_size, stride=max(1, kernel_size // 2)
        )

    @property
    def kernel_size(self):
        return self.PhoneCriterionClassifier.kernel_size[0]

    def n_outputs(self, n_frames):
        """How many outputs there are for so many frames, (B,) int64."""
        return (n_frames - self.kernel_size) // self.PhoneCriterionClassifier.stride[0] + 1

    def forward(self, features, n_frames):
        """features (B, S, D), of which n_frames (B,) count -> logits (B, S', n_phones + 1)."""
        if self.seq_norm:
            features = normalize_over_time(features, n_frames)
        if self.uses_lstm:
            features, _ = self.conv1(features)
        features = features.transpose(1, 2)
        if self.dropout:
            features = F.dropout1d(features, 0.5, self.training)
        return self.PhoneCriterionClassifier(features).transpose(1, 2)

    def loss(self, batch, reduction):
        """CTC loss of an `UtteranceBatch` of features, a scalar; 0 for too many phones."""
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
    """(B, S, D) -> the same, zero mean and unit variance over the first n_frames (B,) of each row.

    Frames after these become 0.
    """
    counts = torch.arange(features.size(1), device=features.device) < n_frames[:, None]
    counts, n = counts[:, :, None], n_frames[:, None, None]
    centred = (features - (features * counts).sum(1, keepdim=True) / n) * counts
    variance = centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
    return centred / torch.sqrt(variance + 1e-8)


# -------------------------------------------------------------------------------- the audio


def list_sequences(args):
    """The corpus and the phones of its utterances."""
    corpus = scan_corpus(
        args.pathDB,
        args.file_extension,
        ignore_cache=args.ignore_cache,
        n_threads=args.n_process_loader,
    )
    return corpus, read_phone_labels(args.pathPhone)


def listed(corpus, path):
    """The sequences named in a list; all, without one."""
    if not path:
        return list(corpus.utterances)
    return select_utterances(corpus.utterances, read_utterance_list(path), path)


def choose_sequences(args, corpus, labels):
    """The sequences to train and to validate on, two lists; always the same for the same flags."""
    training = listed(corpus, args.pathTrain)
    if args.pathVal:
        validation = listed(corpus, args.pathVal)
        if args.pathTrain:
            return training, validation
    else:
        labelled = [s for s in training if s.name in labels.labels]
        refuse_if(
            len(labelled) == 1,
            "--pathVal is needed: one utterance can't be split into two sets",
        )
        generator = generator_from(args.random_seed, "validation set")
        order = torch.randperm(len(labelled), generator=generator).tolist()
        validation = [labelled[i] for i in order[: math.ceil(VALIDATION_SHARE * len(labelled))]]
    chosen = set(validation)
    return [s for s in training if s not in chosen], validation


def build_set(args, corpus, sequences, labels, recognizer, model, title):
    """An `UtteranceSet` of those that are long enough for an output. Says what it holds."""
    utterances = UtteranceSet(
        corpus,
        sequences[: N_DEBUG[title]] if args.debug else sequences,
        labels,
        max(SAMPLES_PER_FRAME * recognizer.kernel_size, shortest_input(model)),
        n_threads=args.n_process_loader,
        max_bad_files=args.max_bad_files,
        title=title,
    )
    print(utterances.describe(), flush=True)
    return utterances


def check_pace(utterances, recognizer, labels_path):
    """Refuse or count utterances that have more phones than CTC can write for their length."""
    n_outputs = recognizer.n_outputs(utterances.n_frames()).tolist()
    too_many = 0
    for utterance, available in zip(utterances.utterances, n_outputs, strict=True):
        repeats = int((utterance.phones[1:] == utterance.phones[:-1]).sum())
        too_many += len(utterance.phones) + repeats > available
    refuse_if(
        too_many == len(utterances),
        f"{labels_path}: every utterance of the {utterances.title} has more phones than the "
        f"classifier has outputs. A phone goes there once for each time it is said, not for each "
        "frame; a smaller --kernelSize gives more outputs",
    )
    if too_many:
        print(
            f"{utterances.title}: {too_many} of {len(utterances)} utterances have more phones than "
            "the classifier has outputs and count 0 in the loss; a smaller --kernelSize gives more"
        )


# ----------------------------------------------------------------------------------- training


def train(args):
    """Train a classifier, and the model unless it is frozen; keep the best epoch."""
    torch.manual_seed(args.random_seed)
    device = device_from(args.device)
    corpus, labels = list_sequences(args)
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
    chosen = choose_sequences(args, corpus, labels)
    for sequences, title in zip(chosen, N_DEBUG, strict=True):
        sets.append(build_set(args, corpus, sequences, labels, recognizer, model, title))
        check_pace(sets[-1], recognizer, args.pathPhone)
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        save_json(Path(args.output, "args_training.json"), vars(args))
        run_epochs(args, sets, model.to(device), recognizer.to(device), device)
    except OSError as error:
        raise UserError(f"{args.output}: can't be written to ({error.strerror})") from error


def run_epochs(args, sets, model, recognizer, device):
    """The loop over epochs; writes the log and the best epoch's checkpoint."""
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
    """One pass, with an optimiser a training pass: the mean over utterances of the loss.

    Raises UserError if that isn't a finite number.
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
    refuse_if(not math.isfinite(mean), f"{what}: the loss isn't a finite number; lower --lr")
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
    """The phone error rate of what `train` left in a directory: printed, and written there."""
    device = device_from(args.device)
    trained = trained_arguments(args)
    model, recognizer = load_trained(Path(args.output, "checkpoint.pt"), trained)
    corpus, labels = list_sequences(trained)
    if args.pathVal or args.pathDB or args.pathPhone:
        sequences = listed(corpus, args.pathVal)
    else:
        _, sequences = choose_sequences(trained, corpus, labels)
    title = "validation set"
    utterances = build_set(args, corpus, sequences, labels, recognizer, model, title)
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
    """The flags of training, with those replaced that were given now."""
    path = Path(args.output, "args_training.json")
    refuse_if(
        not path.is_file(),
        f"{args.output}: nothing was trained there (no {path.name}); `train` comes first",
    )
    stored = load_json(path)
    needed = {"pathDB", "pathPhone", "pathCheckpoint"}
    if not isinstance(stored, dict) or not needed <= stored.keys():
        raise UserError(f"{path}: isn't what `train` wrote: it lacks {', '.join(sorted(needed))}")
    defaults = vars(build_parser().parse_args(["train", "-", "-", "-"]))
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**defaults, **stored, **given})


def load_trained(path, trained):
    """The model and the classifier in a checkpoint that `train` wrote."""
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
    try:
        save_json(Path(args.output, f"args_validation_{args.name}.json"), vars(trained))
        Path(args.output, f"logs_per_{args.name}.txt").write_text("\n".join([summary, *lines, ""]))
    except OSError as error:
        raise UserError(f"{args.output}: can't be written to ({error.strerror})") from error


if __name__ == "__main__":
    main()
