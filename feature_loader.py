"""Trained models from their checkpoints, and features of audio files from models.

    model, hidden_gar, hidden_encoder = load_model(["runs/a/checkpoint_30.pt"])
    features = build_feature(model, "utterance.flac")          # (1, frames, hidden_gar)

`load_model` takes checkpoints of this program, of the original one and of its parent, and single
files of configuration and weights, in which models are published.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from criterion.classification import CTCPhoneCriterion, PhoneCriterion
from model import ConcatenatedModel, CPCModelNullspace, build_model, preserved_state
from segments import SEGMENTS, MultiLevelModel, choose_level
from streaming import (
    FRAMES_PER_PART,
    OverlappingParts,
    StreamingModel,  # noqa: F401, for users of this module
    device_of,
    forward_part,
    needs_whole_file,
)
from transformers import CausalAttention
from utils.data.audio import SILENT, Extremes, open_audio, reason, warn_of_loudness
from utils.hidden_state import KeepsHidden
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, first_few
from utils.normalisation import seq_normalization
from utils.run.checkpoint import (
    NULLSPACE,
    Checkpoint,
    open_checkpoint,
    split_state,
    state_under_null_space,
    stored_models,
)
from utils.run.checkpoint import load_weights as load_state

# --------------------------------------------------------------------------------------- loading

PHONE_WEIGHT = re.compile(r"PhoneCriterionClassifier\.(\d+\.)?weight")
AnyPath = str | os.PathLike


def load_model(
    checkpoints: AnyPath | Checkpoint | Iterable[AnyPath | Checkpoint],
    *,
    load_best: bool = False,
    gru_level: int = -1,
    nullspace: bool = False,
    only_frames: bool = False,
    level: str = "frames",
    sampling: str | None = None,
    load_weights: bool = True,
) -> tuple[nn.Module, int, int]:
    """The model of a checkpoint, or the models of several, their features concatenated.

    checkpoints: paths of files or of run directories (the newest in each); or `Checkpoint`s
    load_best: the weights of the run's best epoch instead of its last
    gru_level: if above 0, keep only that many layers of the recurrent context network
    nullspace: require a null-space model, whose features are projected
    only_frames: load only the lower level of models with two
    level: "segments" for the features of the upper level, repeated over their frames
    sampling: replaces the `--samplingType` of the run; `sequential` keeps hidden states
    load_weights: if False, the same architecture with new weights

    Returns the model, on the CPU, and the widths of its contexts and of its encoded frames. The
    model's attribute `arguments` holds a namespace of architecture flags for each single model in
    it, as `build_model` takes. Raises UserError, naming the file, if anything doesn't fit.
    """
    choice = {"load_best": load_best, "gru_level": gru_level, "nullspace": nullspace}
    stored = stored_models(checkpoints, only_frames=only_frames, **choice)
    arguments = [flags for part in stored for flags in part.arguments]
    for flags in arguments if sampling else ():
        flags.samplingType = sampling
    models = [_build(part, load_weights) for part in stored]
    for part in models if level != "frames" else ():
        choose_level(part, level)
    model = models[0] if len(models) == 1 else ConcatenatedModel(models)
    model.arguments = arguments
    return model, model.dim_context, model.dim_encoded


def _build(stored, with_weights):
    """The network of a StoredModel."""
    model = _network(stored.state, iter(stored.arguments))
    if with_weights:
        state = stored.state
        unknown = sorted(state.keys() - model.state_dict().keys())
        if stored.of_original and unknown:  # the original's models have parts that it never used
            print(f"note: {stored.source}: not used: {first_few(unknown)}")
            state = {key: value for key, value in state.items() if key not in unknown}
        load_state(model, state, stored.source)
    return model


def _network(state, arguments):
    """The network that `state` belongs to, with its null spaces.

    arguments: iterator over the flags of the single models in it
    """
    if NULLSPACE not in state:
        return build_model(next(arguments))
    inside = [_network(part, arguments) for part in split_state(state_under_null_space(state))]
    model = inside[0] if len(inside) == 1 else ConcatenatedModel(inside)
    return CPCModelNullspace(model, state[NULLSPACE].T)


def load_criterion_state(path: AnyPath) -> tuple[dict, dict]:
    """Return (weights of a checkpoint's criterion, flags it was trained with), two dicts.

    Raises UserError if the file holds no criterion.
    """
    checkpoint = open_checkpoint(path)
    state = checkpoint.state["cpcCriterion"]
    if not state:
        raise UserError(f"{checkpoint.path}: holds no criterion with weights")
    return state, checkpoint.state["args"]


def load_phone_classifier(path: AnyPath) -> PhoneCriterion | CTCPhoneCriterion:
    """The phone classifier in a checkpoint of supervised training or of linear_separability.py.

    Raises UserError if the criterion in the file isn't one.
    """
    state, flags = load_criterion_state(path)
    weights = [value for key, value in state.items() if PHONE_WEIGHT.fullmatch(key)]
    if not weights or flags.get("centerpushFile") or flags.get("clusters"):
        moved = "was trained on features moved to centers, or on units"
        what = moved if weights else "doesn't name phones"
        raise UserError(
            f"{path}: its criterion {what}; a checkpoint of train.py --supervised "
            "--path_phone_data FILE or of eval/linear_separability.py --pathPhone FILE is needed"
        )
    n_features, n_outputs = weights[0].size(1), weights[-1].size(0)
    if flags.get("CTC"):
        criterion = CTCPhoneCriterion(n_features, n_outputs - 1, n_layers=len(weights))
    else:
        on_encoder = bool(flags.get("onEncoder") or flags.get("get_encoded"))
        n_hidden = weights[0].size(0)  # without a hidden layer, it has no effect
        criterion = PhoneCriterion(n_features, n_outputs, on_encoder, len(weights), n_hidden)
    load_state(criterion, state, path)
    return criterion


# -------------------------------------------------------------------------------- feature modules


class FeatureModule(nn.Module):
    """One of the two outputs of a model: its contexts or, with `get_encoded`, encoded frames.

    With `collapse`, all frames of the batch are concatenated.
    """

    def __init__(self, model: nn.Module, get_encoded: bool, collapse: bool = False):
        super().__init__()
        self.model = model
        self.get_encoded = get_encoded
        self.collapse = collapse

    def forward(
        self, waveform: torch.Tensor, continues: torch.Tensor | None = None
    ) -> torch.Tensor:
        """waveform: (B, 1, L) -> (B, S, D), or (B * S, D) if collapsed."""
        context, encoded = self.model(waveform, continues)
        features = encoded if self.get_encoded else context
        return features.flatten(0, 1) if self.collapse else features

    @property
    def dim_output(self) -> int:
        return self.model.dim_encoded if self.get_encoded else self.model.dim_context


class ModelPhoneCombined(nn.Module):
    """A model with a classifier: the probability of each class in each frame.

    With `one_hot`, 1 for the most probable class and 0 for all others.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, one_hot: bool):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.one_hot = one_hot

    def forward(
        self, waveform: torch.Tensor, continues: torch.Tensor | None = None
    ) -> torch.Tensor:
        """waveform: (B, 1, L) -> (B, S, n), float or, one-hot, int64."""
        logits = self.criterion.logits(*self.model(waveform, continues))
        if self.one_hot:
            return to_one_hot(logits.argmax(dim=2), logits.size(2))
        return logits.softmax(dim=2)


def to_one_hot(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """labels: (B, S) int64 -> (B, S, n_classes) int64, 1 at the label and 0 elsewhere."""
    return F.one_hot(labels, n_classes)


# ------------------------------------------------------------------------- features of audio files


def build_feature(
    model: nn.Module,
    path: AnyPath,
    *,
    get_encoded: bool = False,
    strict: bool = False,
    max_size: int | None = None,
    seq_norm: bool = False,
) -> torch.Tensor:
    """The features of an audio file, (1, frames, D) on the CPU, one frame per 10 ms.

    model: a CPC model, whose contexts or, with `get_encoded`, encoded frames are the features; or a
        `FeatureModule` or `ModelPhoneCombined`
    seq_norm: normalise each feature to zero mean and unit variance over the file
    max_size: cut the file into chunks of this many samples, as the original program did, rounded
        down to whole frames; the limit of a transformer applies as well
    strict: make the last chunk as long as the others (if the file is long enough): it starts
        earlier, and only the missing frames are taken from it

    Without `max_size`, these are the features of `model(waveform)` on all samples of the file, see
    `features_in_parts`. Chunks don't see the samples around them; a model that keeps its hidden
    state carries it from chunk to chunk, others start each chunk in the zero state, and `seq_norm`
    normalises chunks separately. The model is left unchanged. Raises UserError, naming the file, if
    it can't be read, isn't at 16 kHz, or is too short for a frame.
    """
    module = _feature_module(model, get_encoded)
    if max_size:
        return _features_of_file(module, path, max_size, 1, strict, seq_norm, independent=False)
    features = torch.cat(list(features_in_parts(module, path)))[None]
    return seq_normalization(features) if seq_norm else features


def features_in_parts(
    model: nn.Module,
    path: AnyPath,
    *,
    get_encoded: bool = False,
    waveform: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the features of an audio file in parts of at most 20 s, each (T, D) on the CPU.

    Concatenated, they equal those of one pass over the whole file from the zero state, whatever
    `--samplingType`: see streaming.py.

    Encoders that normalise over time (instanceNorm, lfb, mfcc) and contexts that run backwards get
    the whole file at once. A transformer starts again whenever it reaches the number of frames it
    was made for. Segments are found in the whole file, which takes memory for all its frames.
    waveform: (1, n), replaces the file's audio. Other parameters and errors: see `build_feature`.
    Between parts, the model is in eval mode.
    """
    module = _feature_module(model, get_encoded)
    if _gives_segments(module.model):
        yield _features_of_segments(module, path, waveform)
        return
    shortest = shortest_input(module)
    with preserved_state(module.model, module), _kept_hidden_states(module):
        module.eval()
        for audio, frames in _parts(path, _frames_per_part(module), waveform):
            if len(audio) < shortest:
                raise UserError(too_short(path, len(audio), shortest))
            if SAMPLES_PER_FRAME * (frames.stop - frames.start) > longest_input(module):
                raise UserError(
                    f"{path}: too long for this model: its encoder needs the whole file, its "
                    f"transformer takes {longest_input(module)} samples; cut it into chunks of "
                    "this size with --max_size_seq (--maxSizeSeq for ZeroSpeech features)"
                )
            features = forward_part(module, audio, frames)
            yield features.view(-1, features.size(-1)).cpu()


def _gives_segments(model):
    return isinstance(model, MultiLevelModel) and model.level == SEGMENTS


class _BothFeatures(FeatureModule):
    """Contexts and encoded frames, concatenated."""

    def forward(self, waveform, continues=None):
        return torch.cat(self.model(waveform, continues), dim=2)


class _FixedOutputs(nn.Module):
    """A stand-in for a model that returns known contexts and encoded frames."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, waveform, continues=None):
        return self.outputs


@torch.no_grad()
def _features_of_segments(module, path, waveform):
    """Features of the segments of a whole file, (T, D)."""
    model = module.model
    of_frames = model.frameLevelModel
    frames = features_in_parts(_BothFeatures(of_frames, get_encoded=False), path, waveform=waveform)
    frames = torch.cat(list(frames))[None].to(device_of(module))
    with preserved_state(model, module):
        module.eval()
        both = frames.split([of_frames.dim_context, of_frames.dim_encoded], dim=2)
        try:
            module.model = _FixedOutputs(model.find_segments(*both).upsampled())
            features = module(None)
        finally:
            module.model = model
    return features.view(-1, features.size(-1)).cpu()


def _frames_per_part(module):
    """The number of frames to compute at once; infinity if it must be the whole file."""
    if needs_whole_file(module):
        return math.inf
    return min(FRAMES_PER_PART, longest_input(module) // SAMPLES_PER_FRAME)


def _parts(path, n_frames, waveform=None):
    """Yield parts of a file or a waveform, (1, n), and the frames to take from each, a slice."""
    parts = OverlappingParts(SAMPLES_PER_FRAME)
    size = None if n_frames == math.inf else n_frames * SAMPLES_PER_FRAME
    for block in _blocks(path, size) if waveform is None else waveform:
        parts.add(block)
        while parts.n_complete >= n_frames:
            yield parts.take(n_frames)
    yield parts.rest()


@contextlib.contextmanager
def _kept_hidden_states(module):
    """A block in which recurrent networks keep their hidden state from call to call."""
    networks = [part for part in module.modules() if isinstance(part, KeepsHidden)]
    before = [network.keep_hidden for network in networks]
    for network in networks:
        network.keep_hidden = True
    try:
        yield
    finally:
        for network, keep_hidden in zip(networks, before, strict=True):
            network.keep_hidden = keep_hidden


def build_feature_batch(
    model: nn.Module,
    path: AnyPath,
    *,
    get_encoded: bool = False,
    strict: bool = False,
    max_size: int = 8000,
    seq_norm: bool = False,
    batch_size: int = 8,
) -> torch.Tensor:
    """Like `build_feature`, with `batch_size` chunks at once: faster for long files.

    Each chunk starts from the zero state, since the chunks of a batch run in parallel.
    """
    module = _feature_module(model, get_encoded)
    return _features_of_file(module, path, max_size, batch_size, strict, seq_norm, independent=True)


def load_waveform(path: AnyPath) -> torch.Tensor:
    """All samples of an audio file, (1, n) float32 in [-1, 1]; channels are averaged.

    Raises UserError if the file can't be read, is empty, contains NaN, or isn't at 16 kHz.
    """
    return torch.cat(list(_blocks(path)))[None]


def _blocks(path, size=None):
    """Yield the samples of an audio file, (n,), `size` at a time; see `load_waveform`."""
    extremes = Extremes()
    try:
        with open_audio(path) as file:
            if file.samplerate != SAMPLE_RATE:
                raise UserError(
                    f"{path}: is at {file.samplerate} Hz, not {SAMPLE_RATE}; "
                    "utils/corpus/adjust_sample_rate.py converts audio files"
                )
            for block in filter(len, file.blocks_to_end(size)):
                samples = block.mean(axis=1)
                if not np.isfinite(samples).all():
                    raise UserError(f"{path}: contains NaN or infinite samples")
                warn_of_loudness(path, samples)
                extremes.add(samples)
                yield torch.from_numpy(samples)
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{path}: {reason(error)}") from error
    if not extremes.n_samples:
        raise UserError(f"{path}: contains no audio")
    if extremes.is_silent:
        _warn_of_silence(path)


@functools.cache  # once for each file
def _warn_of_silence(path):
    print(f"warning: {path}: {SILENT}")


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
    device = device_of(module)
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
        raise UserError(too_short(path, n_samples, shortest))
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


def too_short(path, n_samples, shortest):
    return f"{path}: {n_samples} samples are too short: the first frame needs {shortest}"


def _batches(chunks, batch_size):
    """Batches of at most `batch_size` full chunks, then the last chunk if it is shorter."""
    full = [chunk for chunk in chunks if chunk.frames == chunks[0].frames]
    yield from (full[i : i + batch_size] for i in range(0, len(full), batch_size))
    yield from ([chunk] for chunk in chunks[len(full) :])


def shortest_input(module: nn.Module) -> int:
    """The smallest number of samples that every encoder in a network accepts."""
    return max(part.shortest for part in module.modules() if hasattr(part, "shortest"))


def longest_input(module: nn.Module) -> float:
    """The largest number of samples that every transformer in a network accepts, or infinity."""
    limits = [part.size_sequence for part in module.modules() if isinstance(part, CausalAttention)]
    return SAMPLES_PER_FRAME * min(limits, default=math.inf)
