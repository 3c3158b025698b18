"""From waveforms to representations: encoders, context networks, and CPC models made of both.

The encoder maps every 160 samples (10 ms) to a frame, the context network summarises all frames so
far: van den Oord et al., "Representation learning with contrastive predictive coding" (2018), with
the channel norm of Riviere et al., "Unsupervised pretraining transfers well across languages"
(2020). The names `gEncoder`, `batchNorm0`, `baseNet` and the like are keys of checkpoints.
"""

import contextlib
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from transformers import build_transformer
from utils.half_overlap_conv import HalfOverlapConv
from utils.hidden_state import KeepsHidden
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, recurrent

# ------------------------------------------------------------------------------------ encoders
# An encoder maps waveforms (B, 1, L) to (B, E, S) with S >= L // 160. Its `output_dim` is E, and
# `shortest` is the smallest L that it accepts, in samples.


class CPCEncoder(nn.Module):
    """Five convolutions, each followed by a norm and a ReLU, on channels-last tensors.

    norm: a key of `NORMS` (the layers are called `batchNorm{i}` for all); linear_output: no
    ReLU after the last norm, so that encoded frames can point anywhere (Kreuk et al. 2020)
    """

    STRIDES_AND_PADDINGS = ((5, 3), (4, 2), (2, 1), (2, 1), (2, 1))

    def __init__(self, dim, norm="layerNorm", linear_output=False):
        super().__init__()
        self.output_dim = dim
        self.linear_output = linear_output
        # A single frame has no variance over time to normalise by.
        self.shortest = SAMPLES_PER_FRAME * (2 if norm == "instanceNorm" else 1)
        for i, (stride, padding) in enumerate(self.STRIDES_AND_PADDINGS):
            self.add_module(f"conv{i}", HalfOverlapConv(dim if i else 1, dim, stride, padding))
            self.add_module(f"batchNorm{i}", NORMS[norm](dim))

    @torch.no_grad()
    def lecun_initialisation(self):
        """Biases of 0, weights uniform with a variance of 1 / fan-in: LeCun et al. (1998).

        The original program keeps PyTorch's default, uniform in +-1 / sqrt(fan-in) for both. As
        speech has an RMS of 0.03 to 0.1, the first layer's output is then nearly all bias, which
        the norms preserve; and weights this small change fast: at high learning rates, all frames
        become alike within a few steps and stay so. This rescales the weights and draws no random
        numbers: modules built later start as with `--initialisation original`.
        """
        for i in range(len(self.STRIDES_AND_PADDINGS)):
            convolution = getattr(self, f"conv{i}")
            convolution.weight *= math.sqrt(3)
            convolution.bias.zero_()

    def forward(self, waveform):
        """waveform: (B, 1, L) -> (B, E, S), S = (L + 1) // 160."""
        x = waveform.transpose(1, 2)
        last = len(self.STRIDES_AND_PADDINGS) - 1
        for i in range(last + 1):
            convolution, norm = getattr(self, f"conv{i}"), getattr(self, f"batchNorm{i}")
            x = norm(convolution(x))
            if i < last or not self.linear_output:
                x = F.relu(x, inplace=True)
        return x.transpose(1, 2)


class ChannelNorm(nn.Module):
    """Normalise each frame to zero mean and unit variance over channels, then scale and shift.

    The variance is unbiased, while F.layer_norm's is smaller by a factor of (C - 1) / C, hence the
    factors here. Unlike F.layer_norm under CUDA's autocast, the output keeps the precision of the
    input: the next convolution would round it anyway, and float32 would take twice the memory and
    time. Mean and variance are still computed in float32.
    """

    EPSILON = 1e-5

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dim, 1))
        self.bias = nn.Parameter(torch.zeros(1, dim, 1))

    def forward(self, x):
        """x: (B, T, C) -> (B, T, C)."""
        dim = x.size(2)
        bias_of_variance = (dim - 1) / dim
        weight = (self.weight.flatten() * math.sqrt(bias_of_variance)).to(x.dtype)
        bias, epsilon = self.bias.flatten().to(x.dtype), self.EPSILON * bias_of_variance
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, (dim,), weight, bias, epsilon)


class BatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        """x: (B, T, C) -> (B, T, C), each channel normalised over batch and time."""
        return super().forward(x.flatten(0, 1)).view_as(x)


class InstanceNorm(nn.InstanceNorm1d):
    def __init__(self, dim):
        super().__init__(dim, affine=True)

    def forward(self, x):
        """x: (B, T, C) -> (B, T, C), each channel of a waveform normalised over time."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


NORMS = {
    "layerNorm": ChannelNorm,
    "batchNorm": BatchNorm,
    "instanceNorm": InstanceNorm,
    "ID": lambda dim: nn.Identity(),
}


class LFBEncoder(nn.Module):
    """Learned filter banks: log energies of complex filters, smoothed over 25 ms.

    Zeghidour et al., "Learning filterbanks from raw speech for phone recognition" (2018). The
    filters have a stride of one sample, so this costs several times as much as `CPCEncoder`.
    """

    WIDTH = 400  # samples: length of the filters and of the smoothing window

    def __init__(self, dim, normalize=True):
        super().__init__()
        self.output_dim = dim
        self.shortest = self.WIDTH
        self.conv = nn.Conv1d(1, 2 * dim, self.WIDTH)
        self.register_buffer("han", torch.hann_window(self.WIDTH)[None, None])
        self.normalize = nn.InstanceNorm1d(dim) if normalize else nn.Identity()

    def forward(self, waveform):
        """waveform: (B, 1, L) -> (B, E, S), S = (L + 61) // 160."""
        real_and_imaginary = self.conv(waveform).unflatten(1, (self.output_dim, 2))
        energy = real_and_imaginary.square().sum(2)
        smoothed = F.conv1d(
            energy.flatten(0, 1)[:, None], self.han, stride=SAMPLES_PER_FRAME, padding=350
        )
        return self.normalize(smoothed.log1p().view(len(waveform), self.output_dim, -1))


class MFCCEncoder(nn.Module):
    """Mel-frequency cepstral coefficients; nothing is learned.

    Energies are floored at 80 dB below the highest one in the batch.
    """

    N_FFT = 321

    def __init__(self, dim):
        from utils.torchaudio_import import torchaudio

        super().__init__()
        self.output_dim = dim
        self.shortest = self.N_FFT // 2 + 1  # the first window is padded by reflection
        mel = {"n_fft": self.N_FFT, "hop_length": SAMPLES_PER_FRAME, "n_mels": max(128, dim)}
        with warnings.catch_warnings():  # filters narrower than a frequency bin are zero
            warnings.filterwarnings("ignore", message=".*mel filterbank has all zero values")
            self.MFCC = torchaudio.transforms.MFCC(SAMPLE_RATE, n_mfcc=dim, melkwargs=mel)

    def forward(self, waveform):
        """waveform: (B, 1, L) -> (B, E, S), S = (L - 1) // 160 + 1."""
        with torch.autocast(waveform.device.type, enabled=False):  # bf16 is too coarse for energies
            return self.MFCC(waveform.squeeze(1))


def build_encoder(args):
    """The encoder that the architecture flags describe, initialised as `--initialisation` says."""
    if args.encoder_type == "cpc":
        if args.normMode not in NORMS:
            raise UserError(f"--normMode {args.normMode}: there are {', '.join(NORMS)}")
        encoder = CPCEncoder(args.hiddenEncoder, args.normMode, args.linearOutput)
        if args.initialisation == "lecun":
            encoder.lecun_initialisation()
        return encoder
    if args.encoder_type == "mfcc":
        return MFCCEncoder(args.hiddenEncoder)
    if args.encoder_type == "lfb":
        return LFBEncoder(args.hiddenEncoder)
    raise UserError(f"--encoder_type {args.encoder_type}: there are cpc, mfcc and lfb")


# ---------------------------------------------------------------------------- context networks
# A context network (autoregressive, AR) maps frames (B, S, E) to contexts (B, S, A). Context t
# depends on frames up to t only, or with `reverse` on frames from t on. `output_dim` is A; `hidden`
# is the state kept from the last batch, or None.


class CPCAR(KeepsHidden, nn.Module):
    """A recurrent network; `mode` is LSTM, GRU or RNN.

    With `keep_hidden`, each row of a batch starts from the final state of the same row of the last
    batch, without gradient through it; otherwise from the zero state. (With `reverse` as well,
    although in its direction the last batch comes after this one.)
    """

    NETWORKS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}

    def __init__(self, dim_encoded, dim_context, keep_hidden, n_layers, mode, reverse=False):
        super().__init__()
        self.output_dim = dim_context
        self.keep_hidden = keep_hidden
        self.reverse = reverse
        self.baseNet = self.NETWORKS[mode](dim_encoded, dim_context, n_layers, batch_first=True)

    @property
    def network(self):
        return self.baseNet

    def forward(self, encoded, continues=None):
        """encoded: (B, S, E), continues: (B,) bool or None for all -> (B, S, A).

        With `keep_hidden`, rows where `continues` is False and rows that the last batch didn't
        have start from the zero state.
        """
        start = self.start(len(encoded), encoded.device, continues)
        frames = encoded.flip(1) if self.reverse else encoded
        context, end = recurrent(self.baseNet, frames, start)
        self.keep(end)
        return context.flip(1) if self.reverse else context


class Stateless:
    """A context network that keeps no hidden state."""

    hidden = None

    def is_hidden_state(self, state):
        return False


class NoAR(Stateless, nn.Module):
    """The context of a frame is the encoded frame itself."""

    def __init__(self, dim):
        super().__init__()
        self.output_dim = dim

    def forward(self, encoded, continues=None):
        """encoded: (B, S, E) -> the same."""
        return encoded


class TransformerAR(Stateless, nn.Sequential):
    """Transformer layers, for up to `size_sequence` frames."""

    def __init__(self, dim, n_layers, size_sequence, abspos, reverse=False):
        super().__init__(*build_transformer(dim, n_layers, size_sequence, abspos))
        self.output_dim = dim
        self.reverse = reverse

    def forward(self, encoded, continues=None):
        """encoded: (B, S, E) -> (B, S, E). Raises UserError if S is above `size_sequence`."""
        if self.reverse:
            return super().forward(encoded.flip(1)).flip(1)
        return super().forward(encoded)


def build_ar(args):
    """The context network that the architecture flags describe.

    With `--samplingType sequential`, where windows follow each other, it keeps its hidden state.
    Raises UserError if the widths don't fit together.
    """
    reverse = args.cpc_mode == "reverse"
    if args.arMode in CPCAR.NETWORKS:
        keep_hidden = args.samplingType == "sequential"
        dims = args.hiddenEncoder, args.hiddenGar
        return CPCAR(*dims, keep_hidden, args.nLevelsGRU, args.arMode, reverse)
    if args.arMode not in ("no_ar", "transformer"):
        raise UserError(f"--arMode {args.arMode}: there are GRU, LSTM, RNN, no_ar and transformer")
    if args.hiddenGar != args.hiddenEncoder:
        raise UserError(
            f"--arMode {args.arMode} keeps the width of its input: "
            f"--hiddenGar {args.hiddenGar} must be --hiddenEncoder {args.hiddenEncoder}"
        )
    if args.arMode == "no_ar":
        return NoAR(args.hiddenEncoder)
    size_sequence = args.sizeWindow // SAMPLES_PER_FRAME
    return TransformerAR(args.hiddenEncoder, 1, size_sequence, args.abspos, reverse)


# -------------------------------------------------------------------------------------- models


class CPCModel(nn.Module):
    """An encoder and a context network."""

    def __init__(self, encoder, ar):
        super().__init__()
        self.gEncoder = encoder
        self.gAR = ar
        self.dim_context, self.dim_encoded = ar.output_dim, encoder.output_dim

    def forward(self, waveform, continues=None, past=None):
        """waveform: (B, 1, L) -> context (B, S, A) and encoded (B, S, E), S = L // 160.

        continues: (B,) bool, the rows that follow on from the last batch (None: all); only used by
            a context network that keeps its hidden state
        past: (N, 1, L), another version of the first N rows to compute their contexts from, such
            as an augmented one; `encoded`, the targets, still comes from `waveform` (None: N = 0)

        Raises UserError if L is too short for a frame.
        """
        n_samples = waveform.size(2)
        if n_samples < self.gEncoder.shortest:
            raise UserError(
                f"{n_samples} samples of audio are too short for this encoder, "
                f"which needs {self.gEncoder.shortest}: leave them out or pad them"
            )
        if past is not None and past.shape != waveform[: len(past)].shape:
            raise ValueError(f"past is {tuple(past.shape)}, the waveform {tuple(waveform.shape)}")
        # One pass of the encoder, so that a norm over the batch sees both.
        audio = waveform if past is None else torch.cat([past, waveform])
        frames = self.gEncoder(audio)[:, :, : n_samples // SAMPLES_PER_FRAME]
        frames = frames.transpose(1, 2).contiguous()
        if past is None:
            return self.gAR(frames, continues), frames
        past_frames, encoded = frames.split([len(past), len(waveform)])
        return self.gAR(torch.cat([past_frames, encoded[len(past) :]]), continues), encoded

    def hidden_state(self):
        """The kept state: a tensor, a tuple of two, or None. It is never modified in place."""
        return self.gAR.hidden

    def set_hidden_state(self, state):
        """Continue from `state`, a `hidden_state()`. Raises ValueError if it doesn't fit."""
        if state is not None and not self.gAR.is_hidden_state(state):
            raise ValueError("not a hidden state of this context network")
        self.gAR.hidden = state

    def reset_hidden(self):
        """Start the next batch from the zero state."""
        self.set_hidden_state(None)


class CPCModelNullspace(nn.Module):
    """A CPC model whose contexts and encoded frames are projected onto the null space of a probe.

    nullspace: (D, D'), where D is the width of both. Raises UserError if their widths differ.
    """

    def __init__(self, cpc, nullspace):
        super().__init__()
        dim, dim_projected = nullspace.shape
        if {cpc.dim_context, cpc.dim_encoded} != {dim}:
            raise UserError(
                f"a null space of width {dim} can't be applied to a model with --hiddenGar "
                f"{cpc.dim_context} and --hiddenEncoder {cpc.dim_encoded}: all must be equal"
            )
        self.cpc = cpc
        self.nullspace = nn.Linear(dim, dim_projected, bias=False)
        self.nullspace.weight = nn.Parameter(nullspace.T.contiguous())
        self.dim_context = self.dim_encoded = dim_projected
        if hasattr(cpc, "gEncoder"):  # a ConcatenatedModel has none
            self.gEncoder = cpc.gEncoder

    def forward(self, waveform, continues=None, past=None):
        """waveform: (B, 1, L) -> context and encoded, each (B, S, D'). See CPCModel.forward."""
        context, encoded = self.cpc(waveform, continues, past)
        return self.nullspace(context), self.nullspace(encoded)

    def hidden_state(self):
        return self.cpc.hidden_state()

    def set_hidden_state(self, state):
        self.cpc.set_hidden_state(state)

    def reset_hidden(self):
        self.cpc.reset_hidden()


class ConcatenatedModel(nn.Module):
    """Several models of the same audio, their features concatenated."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.dim_context = sum(model.dim_context for model in models)
        self.dim_encoded = sum(model.dim_encoded for model in models)

    def forward(self, waveform, continues=None, past=None):
        """(B, 1, L) -> context (B, S, sum of A), encoded (B, S, sum of E). See CPCModel.forward."""
        outputs = [model(waveform, continues, past) for model in self.models]
        contexts, encodeds = zip(*outputs, strict=True)
        return torch.cat(contexts, dim=2), torch.cat(encodeds, dim=2)

    def hidden_state(self):
        return [model.hidden_state() for model in self.models]

    def set_hidden_state(self, state):
        for model, its_state in zip(self.models, state, strict=True):
            model.set_hidden_state(its_state)

    def reset_hidden(self):
        for model in self.models:
            model.reset_hidden()


def build_model(args, frame_model=None):
    """The CPC model that the architecture flags describe, with random weights.

    frame_model: a trained model to start the frame level from
    """
    frame_model = frame_model or CPCModel(build_encoder(args), build_ar(args))
    if not args.multiLevel:
        return frame_model
    from segments import add_segments  # models of one level needn't import it

    return add_segments(frame_model, args)


@contextlib.contextmanager
def preserved_state(model, criterion=None):
    """A block that starts from a zero hidden state and leaves the networks as they were.

    Restores the hidden state, the train or eval modes and `requires_grad`, but not weights and
    buffers, which the block must not change.
    """
    networks = [model] if criterion is None else [model, criterion]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    gradients = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    hidden = model.hidden_state()
    model.reset_hidden()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires in gradients:
            parameter.requires_grad_(requires)
        model.set_hidden_state(hidden)
