"""The second level: a CPC model of segments, found in the frames of another CPC model.

Segments are the frames between two boundaries; their vectors are the means of these frames. A
segment encoder and an LSTM over segments follow, as encoder and context network of the level.
Bhati et al., "Segmental contrastive predictive coding for unsupervised word segmentation"
(Interspeech 2021), and Cuervo et al., "Contrastive prediction strategies for unsupervised
segmentation and categorization of phonemes and words" (2021). The names `frameLevelModel`,
`sEncoder` and `sAR` are keys of checkpoints.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from utils.hidden_state import KeepsHidden
from utils.misc import UserError
from utils.peaks import neighbour_cosines, peak_prominence, scaled_to_one
from utils.run.level_flags import learns_boundaries

FRAMES, SEGMENTS = LEVELS = ("frames", "segments")

# -------------------------------------------------------------------------------- boundaries
# A segmenter maps frames (B, S, D) to boundaries (B, S) int64, 1 at the first frame of each
# segment, row by row. The first frame of a row always starts a segment.


class CosineSegmenter(nn.Module):
    """Boundaries at peaks of the cosine distance of neighbouring frames, scaled to 0..1 per row.

    prominence: how prominent a peak must be to be a boundary. Without prominent peaks, as in
    silence, the whole row is one segment.
    """

    def __init__(self, prominence):
        super().__init__()
        self.prominence = prominence

    @torch.no_grad()
    def forward(self, frames):
        return from_first_frame(peak_prominence(change_of(frames)) >= self.prominence)


class ThresholdSegmenter(nn.Module):
    """Boundaries where that distance is higher than at both neighbours, by more than a threshold.

    The detector of Bhati et al.: higher than both places one frame away, and by more than
    `threshold` higher than both one frame away or both two frames away. As there, no gradient
    reaches the boundaries.
    """

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, frames):
        change = change_of(frames)

        def above(n):
            """How far each place is above both places n frames away; at least 0, at the ends 0."""
            step = F.pad(change[:, n:] - change[:, :-n], (n, n))
            return torch.minimum(step[:, : change.size(1)], -step[:, n:]).clamp(min=0)

        near = above(1)
        return from_first_frame((near > 0) & (torch.maximum(near, above(2)) > self.threshold))


class EveryFrame(nn.Module):
    """Each frame is a segment (`--noSegmentation`)."""

    def forward(self, frames):
        return torch.ones(frames.shape[:2], dtype=torch.long, device=frames.device)


def change_of(frames):
    """Cosine distances of neighbouring frames, (B, S, D) -> (B, S - 1), scaled to 0..1 per row."""
    return scaled_to_one(1 - neighbour_cosines(frames))


def from_first_frame(changes):
    """changes: (B, S - 1) bool, between frames -> boundaries (B, S)."""
    return F.pad(changes, (1, 0), value=True).long()


def build_segmenter(args, frame_model):
    if args.noSegmentation:
        return EveryFrame()
    if learns_boundaries(args):
        from boundary_policy import LearnedSegmenter  # other runs needn't import it

        width = frame_model.dim_context if args.segmentOnContext else frame_model.dim_encoded
        return LearnedSegmenter(width, args.nLayersBoundaryPredictor)
    kinds = {"cosineDissimilarity": CosineSegmenter, "scpc": ThresholdSegmenter}
    return kinds[args.segmentationMode](args.segmentProminence)


# ---------------------------------------------------------------------------------- segments


class Segments(NamedTuple):
    """The segments of a batch, up to n in each row."""

    context: torch.Tensor  # (B, n, C), zero beyond a row's last segment
    encoded: torch.Tensor  # (B, n, E), the same
    lengths: torch.Tensor  # (B,) int64, the number of segments in each row
    boundaries: torch.Tensor  # (B, S) int64, 1 at the first frame of each segment
    choice: tuple | None = None  # of a learned policy: boundary_policy.Choice

    def upsampled(self):
        """Contexts and encoded segments repeated over their frames: (B, S, C) and (B, S, E)."""
        segment = (self.boundaries.cumsum(1) - 1).unsqueeze(2)
        return tuple(
            vectors.gather(1, segment.expand(-1, -1, vectors.size(2)))
            for vectors in (self.context, self.encoded)
        )


def means_of_segments(frames, boundaries):
    """frames (B, S, D) -> the mean of each segment, (N, D), row after row."""
    first = boundaries.flatten().nonzero().squeeze(1)
    end = first.new_full((1,), boundaries.numel())
    return torch.segment_reduce(frames.flatten(0, 1), "mean", lengths=torch.diff(first, append=end))


def repeat_last(vectors, lengths, least):
    """Repeat the last segment of each row that has fewer than `least`.

    vectors: (N, D), row after row; lengths: (B,). Returns both with the repetitions.
    """
    longer = lengths.clamp(min=least)
    row = torch.arange(len(lengths), device=vectors.device).repeat_interleave(longer)
    place = torch.arange(len(row), device=vectors.device) - (longer.cumsum(0) - longer)[row]
    starts = lengths.cumsum(0) - lengths
    chosen = starts[row] + torch.minimum(place, lengths[row] - 1)
    return vectors.index_select(0, chosen), longer


class SegmentAR(KeepsHidden, nn.LSTM):
    """The context network of segments: one LSTM layer, over rows of different lengths."""

    def __init__(self, dim_encoded, dim_context, keep_hidden):
        super().__init__(dim_encoded, dim_context, batch_first=True)
        self.keep_hidden = keep_hidden

    @property
    def network(self):
        return self

    def forward(self, encoded, lengths, continues=None):
        """encoded (B, n, E), lengths (B,) -> (B, n, C), zero beyond the lengths."""
        start = self.start(len(encoded), encoded.device, continues)
        packed = pack_padded_sequence(encoded, lengths.cpu(), True, enforce_sorted=False)
        contexts, end = super().forward(packed, start)
        self.keep(end)
        return pad_packed_sequence(contexts, batch_first=True)[0]


# ------------------------------------------------------------------------------------- model


class MultiLevelModel(nn.Module):
    """A CPC model of frames, and a level above it for their segments.

    Called like a CPCModel, it returns the features of `level`: "frames", or "segments", whose
    vectors are repeated over their frames. `both_levels` returns both.

    frame_model: a CPCModel; segmenter: see above; dim_encoded, dim_context: widths of the segment
    encoder and the LSTM; on_context: find segments in contexts and average these, instead of
    encoded frames; keep_hidden: see CPCAR
    """

    def __init__(
        self, frame_model, segmenter, dim_encoded, dim_context, *, on_context, keep_hidden
    ):
        super().__init__()
        width = frame_model.dim_context if on_context else frame_model.dim_encoded
        self.frameLevelModel = frame_model
        self.segmenter = segmenter
        self.sEncoder = nn.Sequential(
            nn.Linear(width, dim_encoded), nn.ReLU(), nn.Linear(dim_encoded, dim_encoded)
        )
        self.sAR = SegmentAR(dim_encoded, dim_context, keep_hidden)
        self.on_context = on_context
        self.learns_boundaries = hasattr(segmenter, "choose")  # a boundary_policy.LearnedSegmenter
        self.level = FRAMES
        self.frames_are_frozen = False

    def forward(self, waveform, continues=None, past=None):
        """waveform (B, 1, L) -> context and encoded of `level`, each (B, S, ...). See CPCModel."""
        frames = self.frameLevelModel(waveform, continues, past)
        if self.level == FRAMES:
            return frames
        return self.find_segments(*frames, continues).upsampled()

    def both_levels(self, waveform, continues=None, *, least=1):
        """(context, encoded) of the frames, and the `Segments`.

        least: repeat the last segment of rows with fewer segments than this
        """
        frames = self.frameLevelModel(waveform, continues)
        return frames, self.find_segments(*frames, continues, least)

    def find_segments(self, context, encoded, continues=None, least=1):
        """The `Segments` of frames, context (B, S, C) and encoded (B, S, E); always in float32."""
        frames = context if self.on_context else encoded
        with torch.autocast(frames.device.type, enabled=False):
            frames = frames.to(self.sEncoder[0].weight.dtype)
            choice = self.segmenter.choose(frames) if self.learns_boundaries else None
            boundaries = choice.boundaries if choice else self.segmenter(frames)
            vectors, lengths = means_of_segments(frames, boundaries), boundaries.sum(1)
            if least > 1:
                vectors, lengths = repeat_last(vectors, lengths, least)
            encoded = self.sEncoder(vectors).split(lengths.tolist())
            encoded = pad_sequence(encoded, batch_first=True)
            context = self.sAR(encoded, lengths, continues)
            return Segments(context, encoded, lengths, boundaries, choice)

    @property
    def dim_context(self):
        at_frames = self.level == FRAMES
        return self.frameLevelModel.dim_context if at_frames else self.sAR.hidden_size

    @property
    def dim_encoded(self):
        at_frames = self.level == FRAMES
        return self.frameLevelModel.dim_encoded if at_frames else self.sAR.input_size

    def freeze_frames(self):
        """Train the segment level alone: the frame level stays in eval mode, without gradient."""
        self.frames_are_frozen = True
        self.frameLevelModel.requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        if self.frames_are_frozen:
            self.frameLevelModel.eval()
        return self

    def hidden_state(self):
        """Of both levels, see CPCModel.hidden_state."""
        return [self.frameLevelModel.hidden_state(), self.sAR.hidden]

    def set_hidden_state(self, state):
        """Continue from `state`, a `hidden_state()`. Raises ValueError if it doesn't fit."""
        of_frames, of_segments = state
        if of_segments is not None and not self.sAR.is_hidden_state(of_segments):
            raise ValueError("not a hidden state of this segment level")
        self.frameLevelModel.set_hidden_state(of_frames)
        self.sAR.hidden = of_segments

    def reset_hidden(self):
        """Let the next batch start from the zero state."""
        self.set_hidden_state((None, None))


def add_segments(frame_model, args):
    """The MultiLevelModel that the architecture flags describe, on top of `frame_model`."""
    return MultiLevelModel(
        frame_model,
        build_segmenter(args, frame_model),
        args.hiddenEncoderSegment,
        args.hiddenGarSegment,
        on_context=args.segmentOnContext,
        keep_hidden=args.samplingType == "sequential",
    )


def layer_name(get_encoded, level):
    """The name of a level's features in results."""
    return ("encoded" if get_encoded else "context") + " (segments)" * (level == SEGMENTS)


def choose_level(model, level):
    """Make a model return the features of `level`. Raises UserError if it has no such level."""
    levels = [part for part in model.modules() if isinstance(part, MultiLevelModel)]
    if level == SEGMENTS and not levels:
        raise UserError(
            "--level segments: this model has only the frame level; train with --multiLevel"
        )
    for part in levels:
        part.level = level


@contextlib.contextmanager
def at_level(model, level):
    """A block in which `model`, otherwise at the frame level, returns the features of `level`."""
    choose_level(model, level)
    try:
        yield
    finally:
        choose_level(model, FRAMES)
