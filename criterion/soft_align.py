"""CPC-CTC: contrastive predictive coding whose predictions are aligned to the frames ahead.

After Chorowski et al., "Aligned contrastive predictive coding" (2021): the K predictions at an
anchor are aligned, in order, to the M >= K frames that follow it. Each prediction takes one or
several consecutive frames, and the loss sums over all alignments, as in CTC (Graves et al., 2006).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from criterion.prediction import ContrastiveCriterion, CriterionOutput, mean_over_anchors
from utils.misc import Chance, UserError, not_compiled

FORBIDDEN = -1000.0  # log-probability of a masked match
LOG_ZERO = -1e30  # log-probability of impossible paths; finite, so that differences aren't NaN

NO_BLANK = "no blank"
FORBIDDEN_BLANK = "forbidden blank"
LEARNED_BLANK = "learned blank"


class CPCCTCCriterion(ContrastiveCriterion):
    """Distinguish the frames ahead from random frames, with predictions aligned to them.

    n_predictions, n_matched: K predictions for the M frames after each anchor
    skips_beg, skips_end: number of leading and trailing predictions that may stay unaligned
    self_loop: the encoded anchor frame is an additional prediction, before the K others
    learn_blank: a learned prototype is an additional prediction, before all others, that any
        frame may match
    no_negatives_in_match_window: negatives lie at least n_matched frames after their anchor
    mask_rules: pairs of slices (of the M frames, of the K predictions) that must not match; the
        mask of the first prediction also holds for the self loop and the blank
    loss_temperature: divides log-probabilities in the alignment; higher is softer
    normalize_encodings, normalize_predictions: layer norm over features, without parameters

    Other parameters: see ContrastiveCriterion. Raises UserError if they contradict each other.
    """

    step_name = "matched frame"

    def __init__(
        self,
        n_predictions,
        n_matched,
        *,
        dim_encoded,
        skips_beg=0,
        skips_end=0,
        self_loop=False,
        learn_blank=False,
        no_negatives_in_match_window=False,
        mask_rules=(),
        loss_temperature=1.0,
        normalize_encodings=False,
        normalize_predictions=False,
        **common,
    ):
        super().__init__(
            n_predictions=n_predictions,
            n_future=n_matched,
            dim_encoded=dim_encoded,
            first_offset=n_matched if no_negatives_in_match_window else 1,
            **common,
        )
        self.n_extra = self_loop + learn_blank
        if n_predictions + self.n_extra > n_matched:
            raise UserError(
                f"--nPredicts {n_predictions}, plus {self.n_extra} for --CPCCTCSelfLoop and "
                f"--CPCCTCLearnBlank, is more than the {n_matched} frames of --CPCCTCNumMatched, "
                "of which each prediction needs one: match more frames or predict fewer"
            )
        self.skips = (skips_beg, skips_end)
        self.self_loop = self_loop
        self.loss_temperature = loss_temperature
        self.normalize_encodings = normalize_encodings
        self.normalize_predictions = normalize_predictions
        self.blank_proto = nn.Parameter(torch.zeros(1, 1, dim_encoded, 1)) if learn_blank else None
        if learn_blank and self.cosine_scores:  # a zero vector has no direction to learn from
            nn.init.normal_(self.blank_proto)
        mask = build_mask(mask_rules, n_matched, n_predictions) if mask_rules else None
        self.register_buffer("masq_buffer", mask)

    @property
    def n_losses(self):
        return self.n_future

    def forward(self, context, encoded, speaker, capture=frozenset(), generator=None, lengths=None):
        """context (B, S, C), encoded (B, S, E), speaker (B,) -> CriterionOutput with (1, M).

        The total loss is split among the matched frames: the losses sum to it. P is K plus the self
        loop and the blank. capture: any of "pred", the predictions (B, W, E, P); "cpcctc_align",
        the most likely prediction for each frame ahead (B, W, M) int64; "cpcctc_log_scores"
        (B, W, M, P); "anchor_costs", the mean cost of that alignment (X,). generator:
        draws the negatives (None: the global generator).
        lengths: (B,), the frames in each sequence (None: S). If given, "cpcctc_align" and
        "cpcctc_log_scores" have X, the anchors with M frames after them, in place of (B, W).
        """
        context, encoded = (self.padded_to_anchor(x, lengths) for x in (context, encoded))
        context, encoded = self.in_direction(context, encoded)
        if self.normalize_encodings:
            encoded = F.layer_norm(encoded, encoded.shape[-1:])
        predictions = self.predict_all(context, encoded, speaker)
        scores = self.score_candidates(predictions, encoded, generator, lengths)
        positives = scores.positives.transpose(1, 2)  # (X, M, P), X = B * W
        log_scores = self.apply_mask(F.logsigmoid(positives - scores.negatives.unsqueeze(1)))
        cost, alignment = self.align(log_scores)
        # Unlike in plain CPC, a negative that is the true frame itself counts as a mistake, as in
        # the accuracies of the original program.
        hits = scores.higher.transpose(1, 2)
        loss = mean_over_anchors(cost) * self.loss_temperature
        losses = loss * self.loss_fractions(log_scores.detach(), alignment)
        accuracies = mean_over_anchors(aligned_entries(hits, alignment).float())
        anchors = predictions.shape[:2] if lengths is None else (len(alignment),)
        captured = {
            "pred": predictions.transpose(2, 3).float(),
            "cpcctc_align": alignment.unflatten(0, anchors),
            "cpcctc_log_scores": log_scores.unflatten(0, anchors),
        }
        if "anchor_costs" in capture:
            captured["anchor_costs"] = -aligned_entries(log_scores, alignment).mean(1)
        captured = {name: captured[name].detach() for name in capture}
        return CriterionOutput(losses, accuracies, captured)

    def chance(self):
        """The Chance of scores that are all equal: log(N + 1) for each frame, less the logarithm of
        the number of alignments.

        There is none for the accuracy: if scores are random instead of equal, each frame has the
        best of several predictions.
        """
        shape = (1, self.n_future, self.n_predictions + self.n_extra)
        device = None if self.masq_buffer is None else self.masq_buffer.device
        scores = torch.full(shape, -math.log(self.n_negatives + 1), device=device)
        log_scores = self.apply_mask(scores)
        cost, _ = self.align(log_scores)
        return Chance(cost.item() * self.loss_temperature / self.n_future)

    def align(self, log_scores):
        """`soft_align` of log_scores (X, M, P), before they are divided by the temperature."""
        return soft_align(log_scores / self.loss_temperature, *self.skips, blank=self.blank_type)

    @property
    def blank_type(self):
        if self.blank_proto is not None:
            return LEARNED_BLANK
        return NO_BLANK if self.masq_buffer is None else FORBIDDEN_BLANK

    def predict_all(self, context, encoded, speaker):
        """All P predictions: blank prototype, self loop, then the K heads; (B, W, P, E)."""
        predictions = self.predict(context, speaker)
        batch_size, n_anchors, _, dim = predictions.shape
        columns = [predictions]
        if self.self_loop:
            columns.insert(0, encoded[:, :n_anchors].unsqueeze(2))
        if self.blank_proto is not None:
            columns.insert(0, self.blank_proto.mT.expand(batch_size, n_anchors, -1, -1))
        predictions = torch.cat(columns, dim=2)
        return F.layer_norm(predictions, (dim,)) if self.normalize_predictions else predictions

    def apply_mask(self, log_scores):
        """log_scores (X, M, P) with FORBIDDEN wherever a mask rule applies."""
        if self.masq_buffer is None:
            return log_scores
        mask = F.pad(self.masq_buffer, (self.n_extra, 0), mode="replicate")
        return log_scores.masked_fill(mask > 0, FORBIDDEN)

    @staticmethod
    def loss_fractions(log_scores, alignment):
        """Each frame's fraction of the cost of the most likely alignment, (1, M); they sum to 1."""
        costs = mean_over_anchors(-aligned_entries(log_scores, alignment))
        costs = costs + torch.finfo(costs.dtype).tiny  # equal fractions if all costs are 0
        return costs / costs.sum()


def aligned_entries(values, alignment):
    """values (X, M, P) at the prediction aligned to each frame, (X, M)."""
    return values.gather(2, alignment.unsqueeze(2)).squeeze(2)


def parse_mask_rules(text):
    """Parse --CPCCTCMasq into pairs of slices (matched frames, predictions).

    text: comma-separated rules `a:b:c:d`, each number an integer or `none`; a rule means [a:b, c:d]
    in Python's slice notation. Raises ValueError for anything else.
    """
    if not text.strip():
        return []
    return [_parse_mask_rule(rule.strip()) for rule in text.split(",")]


def _parse_mask_rule(rule):
    try:
        bounds = [
            None if bound.strip().lower() == "none" else int(bound) for bound in rule.split(":")
        ]
        first, last, first_prediction, last_prediction = bounds
    except ValueError:
        raise ValueError(
            f"'{rule}' is no mask rule: write a:b:c:d to mask frames a to b - 1 for predictions "
            "c to d - 1, each an integer or none"
        ) from None
    return slice(first, last), slice(first_prediction, last_prediction)


def build_mask(rules, n_matched, n_predictions):
    """(1, M, K) float, 1 where a frame must not match a prediction. Raises UserError."""
    mask = torch.zeros(1, n_matched, n_predictions)
    for frames, predictions in rules:
        chosen = mask[:, frames, predictions]
        if chosen.numel() == 0:
            raise UserError(
                f"--CPCCTCMasq: a rule masks nothing: there are {n_matched} matched frames and "
                f"{n_predictions} predictions, counted from 0"
            )
        chosen.fill_(1)
    return mask


@not_compiled  # a loop over frames, which compiling would unroll
def soft_align(log_probs, skips_beg=0, skips_end=0, blank=NO_BLANK):
    """Align symbols to frames: the cost summed over all alignments, and the best symbols.

    log_probs: (X, M, P), log-probability of symbol p at frame m, not normalised over symbols. An
    alignment assigns a symbol to each frame: all symbols in order, each for one or several
    consecutive frames. The first skips_beg and the last skips_end symbols may stay unaligned: this
    many frames of cost 0 are added at either end.

    blank: NO_BLANK; LEARNED_BLANK: symbol 0 is a CTC blank, allowed between any two other symbols
    and at both ends; FORBIDDEN_BLANK: an extra blank of log-probability FORBIDDEN, needed where a
    mask leaves no other alignment.

    Returns the cost (X,), the negative log of the summed probability of all alignments, and for
    each frame the symbol with the highest posterior, (X, M) int64.
    """
    n_frames, n_symbols = log_probs.shape[1:]
    if n_frames < n_symbols:
        raise ValueError(f"{n_symbols} symbols can't be aligned to {n_frames} frames")
    emissions = F.pad(log_probs.double(), (0, 0, skips_beg, skips_end)).permute(1, 2, 0)
    if blank == NO_BLANK:
        cost, posterior = _SumOverAlignments.apply(emissions.contiguous(), False)
    else:
        if blank == FORBIDDEN_BLANK:
            emissions = F.pad(emissions, (0, 0, 1, 0), value=FORBIDDEN)
        symbol = _symbols_between_blanks(emissions.size(1), emissions.device)
        cost, state_posterior = _SumOverAlignments.apply(emissions.index_select(1, symbol), True)
        posterior = torch.zeros_like(emissions).index_add_(1, symbol, state_posterior)
        if blank == FORBIDDEN_BLANK:
            posterior = posterior[:, 1:]
    alignment = posterior[skips_beg : skips_beg + n_frames].argmax(dim=1).T
    return cost.to(log_probs.dtype), alignment


def _symbols_between_blanks(n_symbols, device):
    """The symbol in each state of a CTC chain: 0, 1, 0, 2, 0, ..., n_symbols - 1, 0."""
    symbol = torch.zeros(2 * n_symbols - 1, dtype=torch.long, device=device)
    symbol[1::2] = torch.arange(1, n_symbols, device=device)
    return symbol


class _SumOverAlignments(torch.autograd.Function):
    """Negative log of the summed probability of all paths through a chain of states.

    emissions: (T, S, X), float64 log-probabilities of state s at frame t. From one frame to the
    next a path stays in its state or advances by one; if every other state is a blank (0, 2, ...,
    S - 1), it may also skip the blank between two symbols. It starts in the first state and ends
    in the last or, with blanks, may also start in the second and end in the last but one.

    Returns the cost (X,) and the posterior probability (T, S, X) of each state, which is minus the
    derivative of the cost. No second recursion (beta) is needed: going back from the last frame,
    the posterior of a state is divided among its predecessors in proportion to their forward
    probabilities (alpha).
    """

    @staticmethod
    def forward(ctx, emissions, with_blanks):
        n_ends = 2 if with_blanks else 1
        # Log-probability of all paths into a state, without and with (alpha) its emission. Both are
        # kept: subtracting the emission again would lose precision.
        incoming, alpha = torch.empty_like(emissions), torch.empty_like(emissions)
        incoming[0, :n_ends], incoming[0, n_ends:] = 0, LOG_ZERO
        torch.add(incoming[0], emissions[0], out=alpha[0])
        for frame in range(1, len(emissions)):
            _paths_into(alpha[frame - 1], with_blanks, out=incoming[frame])
            torch.add(incoming[frame], emissions[frame], out=alpha[frame])
        posterior = torch.zeros_like(emissions)
        posterior[-1, -n_ends:] = alpha[-1, -n_ends:].softmax(dim=0)
        _fill_posterior(posterior, alpha, incoming, with_blanks)
        ctx.save_for_backward(posterior)
        ctx.mark_non_differentiable(posterior)
        return -alpha[-1, -n_ends:].logsumexp(dim=0), posterior

    @staticmethod
    @once_differentiable
    def backward(ctx, cost_gradient, _):
        (posterior,) = ctx.saved_tensors
        return -cost_gradient * posterior, None


def _paths_into(alpha, with_blanks, out):
    """Log-probabilities (S, X) of the paths into each state; alpha (S, X) of the frame before."""
    out[0] = alpha[0]
    torch.logaddexp(alpha[1:], alpha[:-1], out=out[1:])
    if with_blanks:
        torch.logaddexp(out[3::2], alpha[1:-2:2], out=out[3::2])


def _fill_posterior(posterior, alpha, incoming, with_blanks):
    """Fill in posterior (T, S, X) from the last frame to the first."""
    stayed = (alpha[:-1] - incoming[1:]).exp_()
    advanced = 1 - stayed
    if with_blanks:
        skipped = (alpha[:-1, 1:-2:2] - incoming[1:, 3::2]).exp_()
        advanced[:, 3::2] -= skipped
    for frame in range(len(posterior) - 1, 0, -1):
        now, before = posterior[frame], posterior[frame - 1]
        torch.mul(now, stayed[frame - 1], out=before)
        before[:-1].addcmul_(now[1:], advanced[frame - 1, 1:])
        if with_blanks:
            before[1:-2:2].addcmul_(now[3::2], skipped[frame - 1])
