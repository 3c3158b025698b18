"""Learned boundaries: a policy that decides at each frame whether a segment begins there.

Cuervo et al., "Variable-rate hierarchical CPC leads to acoustic unit discovery in speech" (2022):
a transformer looks at all encoded frames, and learns by REINFORCE (criterion/reinforce.py) where
boundaries make segments predictable. The names `boundaryPredictor`, `transformer` and `policy` are
keys of checkpoints.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from transformers import TransformerLayer, check_heads

POSITIONS = 128  # frames that a layer looks back or ahead, less one: that of hCPC's checkpoints
BLOCK = 1024  # frames at once
APART = 4  # frames from one boundary to the next, at least
SUPPRESSED = -1e4  # added to the logit of a boundary too near the last one
HIGHEST, LOWEST, DECAY = 2.0, 0.5, 0.999992163431717  # temperature, by updates


class Choice(NamedTuple):
    """Decisions of a policy in a batch, and their probabilities."""

    boundaries: torch.Tensor  # (B, S) int64, 1 at the first frame of each segment
    actions: torch.Tensor  # (B, S) int64, the same but for first frames, where 0 changes nothing
    log_probs: torch.Tensor  # (B, S, 2), of no boundary and of a boundary


class LearnedSegmenter(nn.Module):
    """A segmenter (see segments.py) whose boundaries are those of a policy."""

    def __init__(self, dim, n_layers):
        super().__init__()
        self.boundaryPredictor = BiDiBoundaryPredictor(dim, n_layers)

    @torch.no_grad()
    def forward(self, frames):
        """The boundaries, (B, S), in frames (B, S, dim), which may be on another device."""
        device = self.boundaryPredictor.baseline.device
        return self.choose(frames.to(device)).boundaries.to(frames.device)

    def choose(self, frames):
        """The `Choice` for frames (B, S, dim): drawn in training, the likelier one otherwise."""
        log_probs = self.boundaryPredictor(frames)
        actions = draw(log_probs) if self.training else log_probs.argmax(dim=2)
        boundaries = F.pad(actions[:, 1:], (1, 0), value=1)
        return Choice(boundaries, actions, log_probs)


class BiDiBoundaryPredictor(nn.Module):
    """Log-probabilities of no boundary and of a boundary at each frame, (B, S, dim) -> (B, S, 2).

    temperature: divides the logits. Raises UserError if `dim` isn't a multiple of 8, the number of
    attention heads.
    """

    def __init__(self, dim, n_layers):
        super().__init__()
        check_heads(dim)
        kind = {"relative": True, "causal": False}
        layers = (TransformerLayer(dim, POSITIONS, **kind) for _ in range(n_layers))
        self.transformer = nn.Sequential(*layers)
        self.policy = nn.Sequential(nn.Linear(dim, 2))
        # Unused but part of the checkpoint format.
        self.register_buffer("baseline", torch.zeros(1))
        self.temperature = LOWEST

    def transformed(self, frames):
        """Yield what the layers make of each BLOCK of frames, whose length attention squares."""
        n_frames, margin = frames.size(1), POSITIONS * len(self.transformer)
        for start in range(0, n_frames, BLOCK):
            first, end = max(start - margin, 0), min(start + BLOCK, n_frames)
            block = self.transformer(frames[:, first : end + margin])
            yield block[:, start - first : end - first]

    def anneal(self, updates):
        """Set the temperature to that after this many steps of the optimiser."""
        self.temperature = max(HIGHEST * DECAY**updates, LOWEST)

    def forward(self, frames):
        logits = self.policy(torch.cat(list(self.transformed(frames)), dim=1))
        likely = logits[..., 1] > logits[..., 0]
        suppressed = near_earlier(keep_apart(likely)) * SUPPRESSED
        logits = torch.stack([logits[..., 0], logits[..., 1] + suppressed], dim=2)
        return F.log_softmax(logits / self.temperature, dim=2)


def draw(log_probs):
    """Actions drawn from log_probs (..., 2), by the global generator: (...) int64."""
    chance = log_probs.detach()[..., 1].exp()
    return (torch.rand_like(chance) < chance).long()


def keep_apart(candidates):
    """candidates (B, S) bool -> those that stay if each that does removes the APART - 1 after it.

    From the first candidate on, one jumps from each kept one to the next. Jumps are joined to jumps
    of twice the length, so it takes log S operations on all frames at once.
    """
    n_frames = candidates.size(1)
    frame = torch.arange(n_frames, device=candidates.device)
    next_one = torch.where(candidates, frame, n_frames).flip(1).cummin(dim=1).values.flip(1)
    next_one = F.pad(next_one, (0, APART + 1), value=n_frames)  # n_frames: there is none
    jump = next_one[:, APART:]
    kept = torch.zeros_like(jump).scatter_(1, next_one[:, :1], 1)
    for _ in range((n_frames // APART).bit_length()):
        kept = kept | torch.zeros_like(jump).scatter_reduce(1, jump, kept, "amax")
        jump = jump.gather(1, jump)
    return kept[:, :n_frames].bool()


def near_earlier(boundaries):
    """Frames fewer than APART after one of `boundaries` (B, S) bool."""
    n_frames = boundaries.size(1)
    shifted = (F.pad(boundaries, (n, 0))[:, :n_frames] for n in range(1, APART))
    return torch.stack(list(shifted)).any(dim=0)
