"""Features of audio that comes piece by piece, equal to those of the whole.

An encoded frame t depends on the samples 160t - 153 to 160t + 311, and its context on the encoded
frames up to t. So audio can be cut into parts that overlap by one frame, if the first and the last
frame of each part aren't used and the context network keeps its hidden state from part to part.
"""

import contextlib
import copy
import itertools

import torch
from torch import nn

from model import CPCAR, CPCModel, LFBEncoder, MFCCEncoder
from segments import SEGMENTS, MultiLevelModel
from transformers import CausalAttention
from utils.half_overlap_conv import HalfOverlapConv
from utils.misc import SAMPLES_PER_FRAME, UserError

LOOK_AHEAD = 152  # samples after its own 160 that an encoded frame depends on
FRAMES_PER_PART = 2000  # of a long file or piece that go through the model at once


class StreamingModel:
    """A model for live audio: frames come as soon as they are complete.

        stream = StreamingModel(model)
        for piece in microphone:
            contexts, encoded = stream.push(piece)
        contexts, encoded = stream.close()

    Frame t is complete with sample 160t + 311: a look-ahead of 152 samples (9.5 ms) beyond its own
    10 ms. Concatenated, the frames are those of one pass over all the audio; memory is constant.

    model: a CPC model, null-space model or concatenation of these. The stream has a copy of it, in
    eval mode. Raises UserError, with the reason, if its features depend on the whole file (instance
    norm, lfb, mfcc, reverse) or it has a transformer. For the same reason there is no sequence
    normalisation.
    """

    def __init__(self, model):
        if reason := needs_whole_file(model):
            raise UserError(f"a model that can't be streamed: {reason}")
        if any(isinstance(part, CausalAttention) for part in model.modules()):
            raise UserError(
                "a model that can't be streamed: its transformer looks back at all frames, and can "
                "take only as many as a training window has"
            )
        self.model = copy.deepcopy(model).eval()
        self.model.reset_hidden()
        for part in self.model.modules():
            if isinstance(part, CPCAR):
                part.keep_hidden = True
            if isinstance(part, HalfOverlapConv):
                part.keep_halves()
        self.parts, self.ended = OverlappingParts(LOOK_AHEAD), False

    def push(self, audio):
        """Take the next samples, and return the frames that they complete.

        audio: (samples,) at 16 kHz in [-1, 1], any number of them, on any device
        Returns contexts (frames, A) and encoded frames (frames, E), float32 on the CPU; `frames`
        may be 0. Raises UserError for NaN or infinite samples, and ValueError for another shape.
        After an error or `close`, it is refused by a ValueError.
        """
        with self._unless_ended():
            self.parts.add(_checked(audio))
            outputs = [self._no_frames()]
            while n_frames := min(self.parts.n_complete, FRAMES_PER_PART):
                outputs.append(self._forward(*self.parts.take(n_frames)))
            return tuple(map(torch.cat, zip(*outputs, strict=True)))

    def close(self):
        """End the audio, and return the remaining frames, as `push` does.

        Every layer is padded as at a file's end, so that L samples have L // 160 frames in all.
        """
        with self._unless_ended():
            audio, frames = self.parts.rest()
            rest = self._forward(audio, frames) if frames.start < frames.stop else self._no_frames()
        self.ended = True
        return rest

    @contextlib.contextmanager
    def _unless_ended(self):
        """A block after whose failure the stream has ended: its place in the audio is lost."""
        if self.ended:
            raise ValueError("this stream has ended, by close() or an error: make another one")
        self.ended = True
        yield
        self.ended = False

    def _forward(self, audio, frames):
        return tuple(output[0].cpu() for output in forward_part(self.model, audio, frames))

    def _no_frames(self):
        return torch.empty(0, self.model.dim_context), torch.empty(0, self.model.dim_encoded)


def _checked(audio):
    """Samples as a float32 tensor (n,) on the CPU. Raises ValueError or UserError."""
    audio = torch.as_tensor(audio, device="cpu").detach()
    if audio.ndim != 1:
        raise ValueError(f"audio of shape {tuple(audio.shape)}, not (samples,)")
    if len(audio) and not audio.is_floating_point():
        raise ValueError(f"audio of {audio.dtype}, not floats in [-1, 1]: divide by the full scale")
    if not audio.isfinite().all():
        raise UserError("the audio contains NaN or infinite samples")
    return audio.float()


class OverlappingParts:
    """Cuts samples that are added piece by piece into parts for a model.

    All but the first part begin one frame before the frames to take from them, and all but the last
    end `margin` samples after these, at least LOOK_AHEAD.
    """

    def __init__(self, margin):
        self.margin = margin
        self.audio, self.first = torch.empty(0), 0  # not yet taken; the first frame to take of it

    def add(self, samples):
        """samples: (n,)"""
        self.audio = torch.cat([self.audio, samples])

    @property
    def n_complete(self):
        """The number of frames that can be taken."""
        return max(0, (len(self.audio) - self.margin) // SAMPLES_PER_FRAME - self.first)

    def take(self, n_frames):
        """A part of the audio, (n,), and which of its frames are the next `n_frames`, a slice."""
        end = self.first + n_frames
        audio, frames = self.audio[: SAMPLES_PER_FRAME * end + self.margin], slice(self.first, end)
        self.audio, self.first = self.audio[SAMPLES_PER_FRAME * (end - 1) :], 1
        return audio, frames

    def rest(self):
        """The same for the end of the audio."""
        return self.audio, slice(self.first, len(self.audio) // SAMPLES_PER_FRAME)


def needs_whole_file(module):
    """Why a model's features can't be computed from parts of a file; "" if they can."""
    reasons = {
        nn.InstanceNorm1d: "its instance norm normalises over the whole file",
        LFBEncoder: "--encoder_type lfb normalises over the whole file",
        MFCCEncoder: "--encoder_type mfcc needs the maximum of the whole file",
    }
    for part in module.modules():
        for kind, reason in reasons.items():
            if isinstance(part, kind):
                return reason
        if getattr(part, "reverse", False):
            return "its contexts run backwards, from the end of the file"
        if isinstance(part, MultiLevelModel) and part.level == SEGMENTS:
            return "its segments are those of the whole file"
    return ""


@torch.no_grad()
def forward_part(module, audio, frames):
    """Outputs of `module` for some encoded frames (a slice) of audio (n,), as a batch of one."""

    def only_these(encoder, inputs, encoded):
        return encoded[:, :, frames]

    models = [part for part in module.modules() if isinstance(part, CPCModel)]
    hooks = [model.gEncoder.register_forward_hook(only_these) for model in models]
    try:
        return module(audio[None, None].to(device_of(module)))
    finally:
        for hook in hooks:
            hook.remove()


def device_of(module):
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
