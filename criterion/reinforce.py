"""The losses of a boundary policy (boundary_policy.py), which learns by REINFORCE.

Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning" (1992), as Cuervo et al., "Variable-rate hierarchical CPC leads to acoustic unit discovery
in speech" (2022) use it: segments that are hard to predict become less likely. A prior keeps the
number of boundaries near that of phones, and a bonus for entropy keeps the policy exploring.
"""

import torch

from utils.run.distributed import mean_over_ranks

MEMORY = 0.99  # of the baseline, a running mean of costs
PRIOR_WINDOWS, PRIOR_FRAMES = 128, 8  # number and length of windows in which they are counted
EPOCHS_OF_BONUS, LOWEST_BONUS = 20, 0.25  # of entropy, which falls linearly from 1


def policy_gradient_loss(setup, log_probs, costs, n_anchors, baseline):
    """REINFORCE: its gradient makes segmentations of high costs less likely.

    log_probs (B, n): of the choices that made each segment; costs (X,): of what is predicted from
    each of the first n_anchors (B,) segments of row 0, of row 1 and so on; baseline: a typical cost
    """
    is_anchor = torch.arange(log_probs.size(1), device=costs.device) < n_anchors.unsqueeze(1)
    log_probs = log_probs * is_anchor
    costs = torch.zeros_like(log_probs).masked_scatter(is_anchor, costs.detach())
    if setup == "reinforceWAdvantage":
        return (log_probs * (costs - baseline)).sum(1).mean()
    cost = costs.sum(1) / n_anchors.clamp(min=1)
    return (log_probs.sum(1) * (cost - baseline * (setup != "vanillaReinforce"))).mean()


@torch.no_grad()
def update_baseline(baseline, costs):
    """Update `baseline` (1,), the running mean of costs, which starts as the first batch's."""
    mean = mean_over_ranks(costs.mean().view(1).to(baseline.dtype))
    baseline.copy_(torch.where(baseline == 0, mean, torch.lerp(mean, baseline, MEMORY)))


def entropy_loss(log_probs, weight):
    """Minus the mean entropy of log_probs (..., 2), times `weight`."""
    return weight * (log_probs.exp() * log_probs).sum(-1).mean()


def entropy_weight(epoch, training):
    bonus = 1 - epoch / EPOCHS_OF_BONUS if training else LOWEST_BONUS
    return max(bonus, LOWEST_BONUS)


def density_loss(boundary_probs, windows, mean_segment):
    """The squared difference of boundaries expected and the number for segments of `mean_segment`
    frames.

    boundary_probs (B, S); windows: see `draw_windows`.
    """
    rows, frames = windows
    expected = boundary_probs[rows.unsqueeze(1), frames].sum(1).mean()
    return (expected - frames.size(1) / mean_segment).square()


def draw_windows(shape, device, generator):
    """Rows (n,) and frames (n, w) of random windows in a batch of `shape`, B and S."""
    batch_size, n_frames = shape
    width, draws_on = min(PRIOR_FRAMES, n_frames), device if generator is None else generator.device
    options = {"generator": generator, "device": draws_on}
    rows = torch.randint(0, batch_size, (PRIOR_WINDOWS,), **options).to(device)
    first = torch.randint(0, n_frames - width + 1, (PRIOR_WINDOWS, 1), **options).to(device)
    return rows, first + torch.arange(width, device=device)


def log_probs_of_segments(choice):
    """The log-probability of what was done in the frames of each segment: (B, n).

    choice: a boundary_policy.Choice; n: the largest number of segments.
    """
    chosen = choice.log_probs.gather(2, choice.actions.unsqueeze(2)).mT  # (B, 1, S)
    segment = choice.boundaries.cumsum(1) - 1
    number = torch.arange(int(segment[:, -1].max()) + 1, device=segment.device)
    return (chosen * (segment.unsqueeze(1) == number.unsqueeze(1))).sum(2)
