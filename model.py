"""From waveforms to representations: encoders, context networks, and the model made of both.

The encoder turns 160 samples (10 ms) into one frame, the context network sums up the frames so
far: van den Oord et al., "Representation learning with contrastive predictive coding" (2018),
with the channel norm of Riviere et al., "Unsupervised pretraining transfers well across
languages" (2020). Attributes named unlike the rest (`gEncoder`, `batchNorm0`, `baseNet`) are keys
of checkpoints.
"""

import contextlib
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from transformers import build_transformer
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, recurrent

# ------------------------------------------------------------------------------------ encoders
# An encoder maps waveforms (B, 1, L) to (B, E, S) with S >= L // 160. It tells `output_dim` (E) and
# `shortest`, the least number of samples that it can work on.


class CPCEncoder(nn.Module):
    """Five convolutions, each with a norm over it and rectified.

    They work on channels-last tensors, where a frame's features lie side by side in memory.
    `norm` is a key of `NORMS`; the names `batchNorm{i}` hold whatever the norm.
    """

    STRIDES_AND_PADDINGS = ((5, 3), (4, 2), (2, 1), (2, 1), (2, 1))

    def __init__(self, dim, norm="layerNorm"):
        super().__init__()
        self.output_dim = dim
        # Over a single frame there is no variance in time to normalise by.
        self.shortest = SAMPLES_PER_FRAME * (2 if norm == "instanceNorm" else 1)
        for i, (stride, padding) in enumerate(self.STRIDES_AND_PADDINGS):
            self.add_module(f"conv{i}", HalfOverlapConv(dim if i else 1, dim, stride, padding))
            self.add_module(f"batchNorm{i}", NORMS[norm](dim))

    def forward(self, waveform):
        """waveform: (B, 1, L) -> (B, E, S), S = (L + 1) // 160."""
        x = waveform.transpose(1, 2)
        for i in range(len(self.STRIDES_AND_PADDINGS)):
            convolution, norm = getattr(self, f"conv{i}"), getattr(self, f"batchNorm{i}")
            x = F.relu(norm(convolution(x)), inplace=True)
        return x.transpose(1, 2)


class HalfOverlapConv(nn.Conv1d):
    """A convolution on channels-last tensors whose kernel spans exactly two strides.

    Neighbouring windows then overlap by half, and each is two adjacent blocks of `stride` frames:
    the output is block t times the first half of the kernel plus block t + 1 times the second.
    The blocks are a view of the padded input, so nothing is unfolded and copied.
    """

    def __init__(self, channels_in, channels_out, stride, padding):
        super().__init__(channels_in, channels_out, 2 * stride, stride, padding)

    def forward(self, x):
        """x: (B, T, channels_in) -> (B, T', channels_out)."""
        x, weight, bias = _in_autocast_dtype(x, self.weight, self.bias)
        (stride,), (padding,) = self.stride, self.padding
        padded = F.pad(x, (0, 0, padding, padding))
        n_blocks = padded.size(1) // stride
        blocks = padded[:, : n_blocks * stride].unflatten(1, (n_blocks, stride)).flatten(2)
        halves = weight.permute(2, 1, 0).reshape(2, blocks.size(2), -1)
        return _BlockPairs.apply(blocks, halves, bias)


def _in_autocast_dtype(*tensors):
    """The tensors as autocast would turn them for a product. Once, before they are expanded."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


class _BlockPairs(torch.autograd.Function):
    """Block t times the first half of a kernel plus block t + 1 times the second, plus a bias.

    blocks: (B, T + 1, K), halves: (2, K, C), bias: (C,) -> (B, T, C). Autograd would make a tensor
    of the size of the blocks for the gradient of either product, and add them up: on a CPU that
    would be a twentieth of the encoder's time, and a third of its memory.
    """

    @staticmethod
    def forward(ctx, blocks, halves, bias):
        ctx.save_for_backward(blocks, halves)
        first, second = halves.unsqueeze(1).expand(-1, len(blocks), -1, -1)
        return torch.baddbmm(bias, blocks[:, :-1], first).baddbmm_(blocks[:, 1:], second)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        blocks, halves = ctx.saved_tensors
        # With a row of zeros after each waveform's, one product takes in all waveforms.
        rows, gradients = blocks.flatten(0, 1), F.pad(gradient, (0, 0, 0, 1)).flatten(0, 1)
        halves_gradient = torch.stack([rows.T @ gradients, rows[1:].T @ gradients[:-1]])
        blocks_gradient = None
        if ctx.needs_input_grad[0]:  # not of the waveform
            blocks_gradient = gradients @ halves[0].T
            blocks_gradient[1:].addmm_(gradients[:-1], halves[1].T)
            blocks_gradient = blocks_gradient.view_as(blocks)
        return blocks_gradient, halves_gradient, gradient.sum(dim=(0, 1))


class ChannelNorm(nn.Module):
    """Each frame's channels to zero mean and unit variance, then scaled and shifted by channel.

    The variance is the unbiased one, of which F.layer_norm's is (C - 1) / C: hence the factors.
    Its output has the precision of its input, other than that of F.layer_norm under CUDA's
    autocast: the next convolution would round it anyway, and in float32 it would take twice the
    memory and time. Mean and variance are computed in float32 all the same.
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
        """x: (B, T, C) -> (B, T, C), normalised by channel over the batch and time."""
        return super().forward(x.flatten(0, 1)).view_as(x)


class InstanceNorm(nn.InstanceNorm1d):
    def __init__(self, dim):
        super().__init__(dim, affine=True)

    def forward(self, x):
        """x: (B, T, C) -> (B, T, C), normalised by channel over the time of each waveform."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


NORMS = {
    "layerNorm": ChannelNorm,
    "batchNorm": BatchNorm,
    "instanceNorm": InstanceNorm,
    "ID": lambda dim: nn.Identity(),
}


class LFBEncoder(nn.Module):
    """Learned filter banks: the energy of complex filters, smoothed over 25 ms, compressed.

    Zeghidour et al., "Learning filterbanks from raw speech for phone recognition" (2018). Its
    filters move by one sample, so it costs several times what `CPCEncoder` does.
    """

    WIDTH = 400  # samples, of a filter and of the smoothing window

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
    """Mel-frequency cepstral coefficients, in which nothing is learned.

    Energies more than 80 dB below the largest one of the batch are raised to that floor.
    """

    N_FFT = 321

    def __init__(self, dim):
        from utils.torchaudio_import import torchaudio

        super().__init__()
        self.output_dim = dim
        self.shortest = self.N_FFT // 2 + 1  # its first window is reflected at the first sample
        spectrogram = {
            "n_fft": self.N_FFT,
            "hop_length": SAMPLES_PER_FRAME,
            "n_mels": max(128, dim),
        }
        with warnings.catch_warnings():  # filters narrower than a bin of the spectrum stay empty
            warnings.filterwarnings("ignore", message=".*mel filterbank has all zero values")
            self.MFCC = torchaudio.transforms.MFCC(SAMPLE_RATE, n_mfcc=dim, melkwargs=spectrogram)

    def forward(self, waveform):
        """waveform: (B, 1, L) -> (B, E, S), S = (L - 1) // 160 + 1."""
        return self.MFCC(waveform.squeeze(1))


def build_encoder(args):
    """The encoder that `--encoder_type`, `--hiddenEncoder` and `--normMode` describe."""
    if args.encoder_type == "cpc":
        if args.normMode not in NORMS:
            raise UserError(f"--normMode {args.normMode}: there are {', '.join(NORMS)}")
        return CPCEncoder(args.hiddenEncoder, args.normMode)
    if args.encoder_type == "mfcc":
        return MFCCEncoder(args.hiddenEncoder)
    if args.encoder_type == "lfb":
        return LFBEncoder(args.hiddenEncoder)
    raise UserError(f"--encoder_type {args.encoder_type}: there are cpc, mfcc and lfb")


# ---------------------------------------------------------------------------- context networks
# A context network (autoregressive, AR) maps frames (B, S, E) to (B, S, A), where frame t of the
# output depends on no later frame of the input, or with `reverse` on no earlier one. It tells
# `output_dim` (A), and in `hidden` what it remembers of its last batch: None if nothing.


class CPCAR(nn.Module):
    """A recurrent network: `mode` is LSTM, GRU or RNN.

    With `keep_hidden` a batch begins in the state in which the last one ended, row by row, without
    gradient from one to the other; without, every batch begins in the zero state. A reversed
    network does the same, although what follows its windows in its own direction came before.
    """

    NETWORKS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}

    def __init__(self, dim_encoded, dim_context, keep_hidden, n_layers, mode, reverse=False):
        super().__init__()
        self.output_dim = dim_context
        self.keep_hidden = keep_hidden
        self.reverse = reverse
        self.hidden = None
        network = self.NETWORKS[mode]
        self.baseNet = network(dim_encoded, dim_context, num_layers=n_layers, batch_first=True)

    def forward(self, encoded, continues=None):
        """encoded: (B, S, E), continues: (B,) bool or None for all -> (B, S, A).

        With `keep_hidden`, rows where `continues` is False begin in the zero state, and so do
        rows beyond the size of the last batch.
        """
        start = self._start(len(encoded), encoded.device, continues)
        frames = encoded.flip(1) if self.reverse else encoded
        context, end = recurrent(self.baseNet, frames, start)
        if self.keep_hidden:
            self.hidden = _each_tensor(torch.Tensor.detach, end)
        return context.flip(1) if self.reverse else context

    def _start(self, batch_size, device, continues):
        """The hidden state to begin a batch in; None is the zero state."""
        if not self.keep_hidden or self.hidden is None:
            return None

        def go_on(state):  # (layers, rows of the last batch, A) -> (layers, B, A)
            state = state[:, :batch_size].to(device)
            state = F.pad(state, (0, 0, 0, batch_size - state.size(1)))
            if continues is not None:
                state = torch.where(continues[:, None], state, 0)
            return state.contiguous()

        return _each_tensor(go_on, self.hidden)

    def can_remember(self, state):
        """Whether `state` has the form of this network's `hidden`."""
        of_two = isinstance(self.baseNet, nn.LSTM)
        tensors = state if of_two else (state,)
        if isinstance(state, tuple) != of_two or not all(map(torch.is_tensor, tensors)):
            return False
        n_rows = {tensor.size(1) if tensor.ndim == 3 else 0 for tensor in tensors}
        shape = (self.baseNet.num_layers, min(n_rows), self.output_dim)
        return len(tensors) == 1 + of_two and all(
            tensor.shape == shape and tensor.is_floating_point() for tensor in tensors
        )


def _each_tensor(function, state):
    """`function` of a hidden state, which of an LSTM is two tensors, else one."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


class Forgetful:
    """A context network that remembers nothing of its last batch."""

    hidden = None

    def can_remember(self, state):
        return False


class NoAR(Forgetful, nn.Module):
    """The context of a frame is the encoded frame itself."""

    def __init__(self, dim):
        super().__init__()
        self.output_dim = dim

    def forward(self, encoded, continues=None):
        """encoded: (B, S, E) -> the same."""
        return encoded


class TransformerAR(Forgetful, nn.Sequential):
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

    Hidden states are kept where windows follow each other, with `--samplingType sequential`.
    Raises UserError where the widths don't fit.
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

    def forward(self, waveform, continues=None):
        """waveform: (B, 1, L) -> context (B, S, A) and encoded (B, S, E), S = L // 160.

        `continues` (B,) says which rows go on from the last batch; it matters only to a context
        network that keeps its hidden state. Raises UserError if L is too short for a frame.
        """
        n_samples = waveform.size(2)
        if n_samples < self.gEncoder.shortest:
            raise UserError(
                f"{n_samples} samples of audio are too short for this encoder, "
                f"which needs {self.gEncoder.shortest}: leave them out or pad them"
            )
        encoded = self.gEncoder(waveform)[:, :, : n_samples // SAMPLES_PER_FRAME]
        encoded = encoded.transpose(1, 2).contiguous()
        return self.gAR(encoded, continues), encoded

    @property
    def dim_context(self):
        return self.gAR.output_dim

    @property
    def dim_encoded(self):
        return self.gEncoder.output_dim

    def hidden_state(self):
        """What the context network remembers: a tensor, a tuple of two, or None.

        Nothing changes it in place, so it is enough to hold on to it and to set it again.
        """
        return self.gAR.hidden

    def set_hidden_state(self, state):
        """Go on from `state`, which `hidden_state()` gave. Raises ValueError if it can't have."""
        if state is not None and not self.gAR.can_remember(state):
            raise ValueError("no hidden state of such a context network")
        self.gAR.hidden = state

    def reset_hidden(self):
        """Forget: the next batch begins in the zero state."""
        self.set_hidden_state(None)


class CPCModelNullspace(nn.Module):
    """A CPC model whose context and encoded frames are projected, on the null space of a probe.

    nullspace: (D, D'), where D is the width of both. Raises UserError if they differ in width.
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
        if hasattr(cpc, "gEncoder"):  # several models side by side have none of their own
            self.gEncoder = cpc.gEncoder

    def forward(self, waveform, continues=None):
        """waveform: (B, 1, L) -> context and encoded, each (B, S, D')."""
        context, encoded = self.cpc(waveform, continues)
        return self.nullspace(context), self.nullspace(encoded)

    @property
    def dim_context(self):
        return self.nullspace.out_features

    @property
    def dim_encoded(self):
        return self.nullspace.out_features

    def hidden_state(self):
        return self.cpc.hidden_state()

    def set_hidden_state(self, state):
        self.cpc.set_hidden_state(state)

    def reset_hidden(self):
        self.cpc.reset_hidden()


class ConcatenatedModel(nn.Module):
    """Several models on the same audio, their features side by side."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, waveform, continues=None):
        """waveform: (B, 1, L) -> context (B, S, sum of A) and encoded (B, S, sum of E)."""
        outputs = [model(waveform, continues) for model in self.models]
        contexts, encodeds = zip(*outputs, strict=True)
        return torch.cat(contexts, dim=2), torch.cat(encodeds, dim=2)

    @property
    def dim_context(self):
        return sum(model.dim_context for model in self.models)

    @property
    def dim_encoded(self):
        return sum(model.dim_encoded for model in self.models)

    def hidden_state(self):
        return [model.hidden_state() for model in self.models]

    def set_hidden_state(self, state):
        for model, its_state in zip(self.models, state, strict=True):
            model.set_hidden_state(its_state)

    def reset_hidden(self):
        for model in self.models:
            model.reset_hidden()


def build_model(args):
    """The CPC model that the architecture flags describe, with fresh weights."""
    return CPCModel(build_encoder(args), build_ar(args))


@contextlib.contextmanager
def preserved_state(model, criterion=None):
    """A block after which the networks are as before it.

    Restores train or eval mode and `requires_grad` everywhere, and the model's kept hidden state.
    Weights and buffers are the block's own business: it must not train them.
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
