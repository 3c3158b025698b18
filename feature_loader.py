"""Trained models from their checkpoints, and features of audio files from models.

    model, hidden_gar, hidden_encoder = load_model(["runs/a/checkpoint_30.pt"])
    features = build_feature(model, "utterance.flac")          # (1, frames, hidden_gar)

`load_model` takes checkpoints of this program, of the original one and of its parent, and single
files of configuration and weights, in which models are published.
"""

import copy
import itertools
import math
import os
import re
from typing import NamedTuple

import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from criterion.classification import CTCPhoneCriterion, PhoneCriterion
from model import ConcatenatedModel, CPCModelNullspace, build_model, preserved_state
from transformers import CausalAttention
from utils.data.audio import open_audio, reason
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, first_few
from utils.run.checkpoint import Checkpoint, open_checkpoint
from utils.run.checkpoint import load_weights as load_state
from utils.run.flags import ARCHITECTURE, stored_arguments

# --------------------------------------------------------------------------------------- loading

MODEL_FLAGS = ARCHITECTURE | {"samplingType"}  # it says whether hidden states are kept
NULLSPACE = "nullspace.weight"
PHONE_WEIGHT = re.compile(r"PhoneCriterionClassifier\.(\d+\.)?weight")
PART = re.compile(r"((?:models\.\d+\.)+)(.*)")  # a key of one of several concatenated models


def load_model(
    checkpoints, *, load_best=False, gru_level=-1, nullspace=False, sampling=None, load_weights=True
):
    """The model of a checkpoint, or those of several, their features side by side.

    checkpoints: paths of files, or of a run's directory for the newest in it; or `Checkpoint`s
    load_best: the weights of the run's best epoch instead of its last
    gru_level: if above 0, keep only that many layers of the recurrent context network
    nullspace: insist on a null-space model, one whose features are projected
    sampling: a `--samplingType` instead of that of the run: `sequential` keeps hidden states
    load_weights: False: the same architecture with fresh weights

    Returns the model, on the CPU, and the widths of its contexts and of its encoded frames. The
    model's attribute `arguments` holds a namespace of architecture flags for each single model in
    it: what `build_model` takes. Raises UserError, naming the file, if anything doesn't fit.
    """
    if isinstance(checkpoints, str | os.PathLike | Checkpoint):
        checkpoints = [checkpoints]
    parts, arguments = [], []
    for given in checkpoints:
        checkpoint = given if isinstance(given, Checkpoint) else open_checkpoint(given)
        for part in _parts(checkpoint, load_best):
            if nullspace and NULLSPACE not in part.state:
                raise UserError(f"{part.source}: isn't a checkpoint of a null-space model")
            part = _keep_layers(part, gru_level)
            for flags in part.arguments if sampling else ():
                flags.samplingType = sampling
            parts.append(_build(part, load_weights))
            arguments += part.arguments
    model = parts[0] if len(parts) == 1 else ConcatenatedModel(parts)
    model.arguments = arguments
    return model, model.dim_context, model.dim_encoded


class _Part(NamedTuple):
    """A model in a checkpoint, or several of which a null space was taken together."""

    arguments: list  # namespaces of architecture flags, one for each single model
    state: dict
    source: str  # the file
    of_original: bool


def _parts(checkpoint, load_best=False):
    """The models in a checkpoint whose features are side by side, as a list of `_Part`."""
    state, path = checkpoint.state["gEncoder"], checkpoint.path
    if load_best:
        state = checkpoint.state.get("best")
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds no best model yet, only the latest")
    arguments, states = stored_architecture(checkpoint), _split_state(state)
    sizes = [_n_models(state) for state in states]
    if len(arguments) != sum(sizes):
        raise UserError(
            f"{path}: holds the weights of {sum(sizes)} models, but the arguments of "
            f"{len(arguments)}"
        )
    flags = iter(arguments)
    return [
        _Part(list(itertools.islice(flags, size)), state, path, checkpoint.of_original)
        for size, state in zip(sizes, states, strict=True)
    ]


def _n_models(state):
    """How many single models there are in a part's state."""
    inside = _split_state(_under_null_space(state)) if NULLSPACE in state else []
    return sum(map(_n_models, inside)) or 1


def _under_null_space(state):
    """The state of the model that a null space was taken of."""
    return {key.removeprefix("cpc."): v for key, v in state.items() if key.startswith("cpc.")}


def _split_state(state):
    """The states of concatenated models, in their order; that of a single model as it is."""
    parts = {}
    for key, value in state.items():
        match = PART.fullmatch(key)
        prefix, name = match.groups() if match else ("", key)
        parts.setdefault(tuple(map(int, re.findall(r"\d+", prefix))), {})[name] = value
    return [parts[position] for position in sorted(parts)]


def stored_architecture(checkpoint, begun_with_it=()):
    """The architecture flags of every single model in a `Checkpoint`: a list of namespaces.

    The original program doesn't keep those of models that a run was begun with (`--load`): they
    are looked up in the checkpoints that it names (`begun_with_it`: those that led here). Raises
    UserError if these are gone.
    """
    stored, path = checkpoint.state["args"], checkpoint.path
    if path in begun_with_it:
        raise UserError(f"{path}: names itself among the checkpoints that it began with")
    if "models" in checkpoint.state:
        return [_model_flags(flags, path) for flags in checkpoint.state["models"]]
    begun_from = _begun_from(checkpoint) if checkpoint.of_original else []
    missing = [name for name in begun_from if not os.path.exists(name)]
    concatenated = any(PART.fullmatch(key) for key in checkpoint.state["gEncoder"])
    if begun_from and not missing:
        above = (*begun_with_it, path)
        inner = (stored_architecture(open_checkpoint(name), above) for name in begun_from)
        return list(itertools.chain.from_iterable(inner))
    if concatenated or (begun_from and "hiddenEncoder" not in stored):
        raise UserError(
            f"{path}: doesn't say what its model is made of, but names the checkpoints that it "
            f"began with, which aren't there: {first_few(missing) or 'none'}. Put them back, or "
            "correct `load` in checkpoint_args.json"
        )
    return [_model_flags(stored, path)]


def _begun_from(checkpoint):
    """Checkpoints of other runs that one of the original program was begun with (`--load`)."""
    stored = checkpoint.state["args"]
    names = [str(name) for name in stored.get("load") or []]
    own = str(stored.get("pathCheckpoint"))
    its_own = {own, os.path.dirname(own), os.path.dirname(os.path.abspath(checkpoint.path))}
    resumed = len(names) == 1 and os.path.dirname(names[0]) in its_own
    return [] if resumed else names


def _model_flags(stored, source):
    """What `build_model` needs of stored arguments, as a namespace."""
    args = stored_arguments({k: v for k, v in stored.items() if k in MODEL_FLAGS}, source)
    if args.arMode in ("no_ar", "transformer"):  # these keep the encoder's width, whatever is asked
        args.hiddenGar = args.hiddenEncoder
    return args


def _keep_layers(part, n_layers):
    """Only the first layers of the recurrent network, if `n_layers` is above 0."""
    if n_layers <= 0:
        return part
    arguments = [copy.copy(args) for args in part.arguments]
    for args in arguments:
        available = args.nLevelsGRU if args.arMode in ("LSTM", "GRU", "RNN") else 0
        if n_layers > available:
            raise UserError(
                f"--gru_level {n_layers}: {part.source} has {available} recurrent layers"
            )
        args.nLevelsGRU = n_layers
    layer = re.compile(r".*\.baseNet\.\w+_l(\d+)")

    def kept(key):
        match = layer.fullmatch(key)
        return not match or int(match[1]) < n_layers

    return part._replace(
        arguments=arguments, state={key: v for key, v in part.state.items() if kept(key)}
    )


def _network(state, arguments):
    """The network that has such a `state`; null spaces are part of the architecture.

    arguments: iterator over the flags of its single models
    """
    if NULLSPACE not in state:
        return build_model(next(arguments))
    inside = [_network(part, arguments) for part in _split_state(_under_null_space(state))]
    model = inside[0] if len(inside) == 1 else ConcatenatedModel(inside)
    return CPCModelNullspace(model, state[NULLSPACE].T)


def _build(part, with_weights):
    model = _network(part.state, iter(part.arguments))
    if with_weights:
        state = part.state
        unknown = sorted(state.keys() - model.state_dict().keys())
        if part.of_original and unknown:  # its models have parts that were never used
            print(f"note: {part.source}: not used: {first_few(unknown)}")
            state = {key: value for key, value in state.items() if key not in unknown}
        load_state(model, state, part.source)
    return model


def load_criterion_state(path):
    """The weights of a checkpoint's criterion, and the flags of the program that trained it: two
    dicts. Raises UserError if the file holds no criterion.
    """
    checkpoint = open_checkpoint(path)
    state = checkpoint.state["cpcCriterion"]
    if not state:
        raise UserError(f"{checkpoint.path}: holds no criterion with weights")
    return state, checkpoint.state["args"]


def load_phone_classifier(path):
    """The phone classifier in a checkpoint of supervised training or of linear_separability.py.

    Raises UserError if the criterion in the file is another one.
    """
    state, flags = load_criterion_state(path)
    weights = [value for key, value in state.items() if PHONE_WEIGHT.fullmatch(key)]
    if not weights or flags.get("centerpushFile"):
        what = "was trained on features moved to centers" if weights else "doesn't name phones"
        raise UserError(
            f"{path}: its criterion {what}; a checkpoint of train.py --supervised "
            "--path_phone_data FILE or of eval/linear_separability.py --pathPhone FILE is needed"
        )
    n_features, n_outputs = weights[0].size(1), weights[-1].size(0)
    if flags.get("CTC"):
        criterion = CTCPhoneCriterion(n_features, n_outputs - 1, n_layers=len(weights))
    else:
        on_encoder = bool(flags.get("onEncoder") or flags.get("get_encoded"))
        criterion = PhoneCriterion(n_features, n_outputs, on_encoder, len(weights))
    load_state(criterion, state, path)
    return criterion


# -------------------------------------------------------------------------------- feature modules


class FeatureModule(nn.Module):
    """One of the two outputs of a model: its contexts or, with `get_encoded`, encoded frames.

    With `collapse`, all frames of the batch are concatenated.
    """

    def __init__(self, model, get_encoded, collapse=False):
        super().__init__()
        self.model = model
        self.get_encoded = get_encoded
        self.collapse = collapse

    def forward(self, waveform, continues=None):
        """waveform: (B, 1, L) -> (B, S, D), or (B * S, D) if collapsed."""
        context, encoded = self.model(waveform, continues)
        features = encoded if self.get_encoded else context
        return features.flatten(0, 1) if self.collapse else features

    @property
    def dim_output(self):
        return self.model.dim_encoded if self.get_encoded else self.model.dim_context


class ModelPhoneCombined(nn.Module):
    """A model with a classifier: the probability of each class in each frame.

    With `one_hot`, 1 for the most probable class and 0 for all others.
    """

    def __init__(self, model, criterion, one_hot):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.one_hot = one_hot

    def forward(self, waveform, continues=None):
        """waveform: (B, 1, L) -> (B, S, n), float or, one-hot, int64."""
        logits = self.criterion.logits(*self.model(waveform, continues))
        if self.one_hot:
            return to_one_hot(logits.argmax(dim=2), logits.size(2))
        return logits.softmax(dim=2)


def to_one_hot(labels, n_classes):
    """labels: (B, S) int64 -> (B, S, n_classes) int64, 1 at the label and 0 elsewhere."""
    return F.one_hot(labels, n_classes)


def seq_normalization(features):
    """(B, S, D) -> (B, S, D), each feature normalised to zero mean and unit variance over time."""
    correction = int(features.size(1) > 1)  # the unbiased variance of a single frame is undefined
    variance, mean = torch.var_mean(features, dim=1, correction=correction, keepdim=True)
    return (features - mean) / torch.sqrt(variance + 1e-8)


# ------------------------------------------------------------------------- features of audio files


def build_feature(model, path, *, get_encoded=False, strict=False, max_size=64000, seq_norm=False):
    """The features of an audio file, (1, frames, D) on the CPU, one frame per 10 ms.

    model: a CPC model, whose contexts or, with `get_encoded`, encoded frames are the features; or a
        `FeatureModule` or `ModelPhoneCombined`
    max_size: samples per chunk, rounded down to whole frames; the limit of a transformer applies
        as well
    strict: make the last chunk as long as the others (if the file is long enough): it starts
        earlier, and only the missing frames are taken from it
    seq_norm: normalise each feature to zero mean and unit variance over each chunk

    A model that keeps its hidden state starts from the zero state and carries it from chunk to
    chunk. The model is left unchanged. Raises UserError, naming the file, if it can't be read,
    isn't at 16 kHz, or is too short for a frame.
    """
    features = _feature_module(model, get_encoded)
    return _features_of_file(features, path, max_size, 1, strict, seq_norm, independent=False)


def build_feature_batch(
    model, path, *, get_encoded=False, strict=False, max_size=8000, seq_norm=False, batch_size=8
):
    """Like `build_feature`, with `batch_size` chunks at once: faster for long files.

    Each chunk starts from the zero state, since the chunks of a batch can't follow on from each
    other.
    """
    features = _feature_module(model, get_encoded)
    return _features_of_file(
        features, path, max_size, batch_size, strict, seq_norm, independent=True
    )


def load_waveform(path):
    """All samples of an audio file, (1, n) float32 in [-1, 1]; channels are averaged.

    Raises UserError if the file can't be read, is empty, contains NaN, or isn't at 16 kHz.
    """
    try:
        with open_audio(path) as file:
            rate = file.samplerate
            waveform = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{path}: {reason(error)}") from error
    if rate != SAMPLE_RATE:
        raise UserError(
            f"{path}: is at {rate} Hz, not {SAMPLE_RATE}; utils/corpus/adjust_sample_rate.py "
            "converts audio files"
        )
    waveform = torch.from_numpy(waveform)[None]
    if waveform.numel() == 0:
        raise UserError(f"{path}: contains no audio")
    if not torch.isfinite(waveform).all():
        raise UserError(f"{path}: contains NaN or infinite samples")
    return waveform


class _Chunk(NamedTuple):
    """Part of a file, in samples; its last `frames` frames are used."""

    start: int
    end: int
    frames: int


def _feature_module(model, get_encoded):
    if isinstance(model, FeatureModule | ModelPhoneCombined):
        return model
    return FeatureModule(model, get_encoded)


def _features_of_file(module, path, max_size, batch_size, strict, seq_norm, *, independent):
    waveform = load_waveform(path)
    chunks = _plan_chunks(module, path, waveform.size(1), max_size, strict)
    device = _device(module)
    features_of_chunks, end = [], None
    with preserved_state(module.model, module), torch.no_grad():
        module.eval()
        for batch in _batches(chunks, batch_size):
            audio = torch.stack([waveform[:, chunk.start : chunk.end] for chunk in batch])
            continues = not independent and batch[0].start == end
            flags = torch.full((len(batch),), continues, device=device)
            features = module(audio.to(device), flags)
            features = features.view(len(batch), -1, features.size(-1))  # undo a collapse
            features = seq_normalization(features) if seq_norm else features
            features_of_chunks.append(features[:, -batch[0].frames :].flatten(0, 1).cpu())
            end = batch[-1].end
    return torch.cat(features_of_chunks)[None]


def _plan_chunks(module, path, n_samples, max_size, strict):
    """Cut a file into full chunks and one for the remaining frames."""
    shortest = shortest_input(module)
    if n_samples < shortest:
        raise UserError(
            f"{path}: {n_samples} samples are too short: the first frame needs {shortest}"
        )
    size = min(max_size, longest_input(module)) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
    if size < shortest:
        raise UserError(
            f"chunks of {size} samples are too short: this model needs at least {shortest}"
        )
    n_full, rest = divmod(n_samples, size)
    chunks = [_Chunk(i * size, (i + 1) * size, size // SAMPLES_PER_FRAME) for i in range(n_full)]
    if rest >= SAMPLES_PER_FRAME:
        starts_earlier = strict or rest < shortest
        start = max(0, n_samples - size) if starts_earlier else n_full * size
        chunks.append(_Chunk(start, n_samples, rest // SAMPLES_PER_FRAME))
    return chunks


def _batches(chunks, batch_size):
    """Batches of at most `batch_size` full chunks, then the last chunk if it is shorter."""
    full = [chunk for chunk in chunks if chunk.frames == chunks[0].frames]
    yield from (full[i : i + batch_size] for i in range(0, len(full), batch_size))
    yield from ([chunk] for chunk in chunks[len(full) :])


def shortest_input(module):
    """The smallest number of samples that all encoders in a network accept."""
    return max(part.shortest for part in module.modules() if hasattr(part, "shortest"))


def longest_input(module):
    """The largest number of samples that all transformers in a network accept, or infinity."""
    limits = [part.size_sequence for part in module.modules() if isinstance(part, CausalAttention)]
    return SAMPLES_PER_FRAME * min(limits, default=math.inf)


def _device(module):
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
