"""CPC-CTC: contrastive predictive coding whose predictions are aligned to the frames ahead.

After Chorowski et al., "Aligned contrastive predictive coding" (2021): the K predictions of a
window are matched, in order, to the M >= K frames that follow it. Each prediction takes one frame
or several in a row, and the loss adds up all ways to do so, as CTC does (Graves et al., 2006).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from criterion.prediction import ContrastiveCriterion, CriterionOutput
from utils.misc import UserError

FORBIDDEN = -1000.0  # log-probability of a masked match
LOG_ZERO = -1e30  # log-probability of the impossible: finite, so that differences of it are numbers

NO_BLANK = "no blank"
FORBIDDEN_BLANK = "forbidden blank"
LEARNED_BLANK = "learned blank"


class CPCCTCCriterion(ContrastiveCriterion):
    """Tell the frames ahead from random ones, by predictions that may come early or late.

    n_predictions, n_matched: K predictions for the M frames after each window
    skips_beg, skips_end: up to so many predictions may go unused at either end
    self_loop: the window's own frame is one more prediction, before the others
    learn_blank: a learned prototype, in front of all, is one more, that any frame may match
    no_negatives_in_match_window: negatives lie at least n_matched frames after their window
    mask_rules: pairs of slices (of the M frames, of the K predictions) that must not match; the
        self loop and the blank share what the first prediction may match
    loss_temperature: log-probabilities are divided by it in the alignment; the larger, the softer
    normalize_encodings, normalize_predictions: layer norm over features, without parameters

    Other parameters: see ContrastiveCriterion. Raises UserError if they can't work together.
    """

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
        mask = build_mask(mask_rules, n_matched, n_predictions) if mask_rules else None
        self.register_buffer("masq_buffer", mask)

    def forward(self, context, encoded, speaker, capture=frozenset(), generator=None):
        """context (B, S, C), encoded (B, S, E), speaker (B,) -> CriterionOutput with (1, M).

        The losses say where in the window the loss, their sum, arises. capture: may hold "pred",
        the predictions (B, W, E, P), P = K and what was added in front; "cpcctc_align", the
        likeliest prediction of each frame ahead (B, W, M) int64; "cpcctc_log_scores", (B, W, M,
        P). generator: where negatives come from (None: the global generator).
        """
        context, encoded = self.in_direction(context, encoded)
        if self.normalize_encodings:
            encoded = F.layer_norm(encoded, encoded.shape[-1:])
        predictions = self.predict_all(context, encoded, speaker)
        scores = self.score_candidates(predictions, encoded, generator)
        positives = scores.positives.transpose(1, 2)  # (X, M, P), X = B * W
        log_scores = self.masked(F.logsigmoid(positives - scores.negatives.unsqueeze(1)))
        cost, alignment = soft_align(
            log_scores / self.loss_temperature, *self.skips, blank=self.kind_of_blank
        )
        best_negative = scores.best_negative.unsqueeze(1)
        # Other than in plain CPC, a negative that is the right frame itself makes it a mistake.
        hits = (positives > best_negative) & ~torch.isclose(positives, best_negative)
        loss = cost.mean() * self.loss_temperature
        losses = loss * self.shares(log_scores.detach(), alignment)
        accuracies = aligned_entries(hits.float(), alignment).mean(dim=0, keepdim=True)
        captured = {
            "pred": predictions.transpose(2, 3).float(),
            "cpcctc_align": alignment.unflatten(0, predictions.shape[:2]),
            "cpcctc_log_scores": log_scores.unflatten(0, predictions.shape[:2]),
        }
        captured = {name: captured[name].detach() for name in capture}
        return CriterionOutput(losses, accuracies, captured)

    @property
    def kind_of_blank(self):
        if self.blank_proto is not None:
            return LEARNED_BLANK
        return NO_BLANK if self.masq_buffer is None else FORBIDDEN_BLANK

    def predict_all(self, context, encoded, speaker):
        """The predictions with what is added in front of them, (B, W, P, E)."""
        predictions = self.predict(context, speaker)
        batch_size, n_anchors, _, dim = predictions.shape
        columns = [predictions]
        if self.self_loop:
            columns.insert(0, encoded[:, :n_anchors].unsqueeze(2))
        if self.blank_proto is not None:
            columns.insert(0, self.blank_proto.mT.expand(batch_size, n_anchors, -1, -1))
        predictions = torch.cat(columns, dim=2)
        return F.layer_norm(predictions, (dim,)) if self.normalize_predictions else predictions

    def masked(self, log_scores):
        """(X, M, P) with FORBIDDEN where the rules forbid a match."""
        if self.masq_buffer is None:
            return log_scores
        mask = F.pad(self.masq_buffer, (self.n_extra, 0), mode="replicate")
        return log_scores.masked_fill(mask > 0, FORBIDDEN)

    @staticmethod
    def shares(log_scores, alignment):
        """Each frame's share in the cost of the likeliest matches, (1, M), adding up to 1."""
        costs = -aligned_entries(log_scores, alignment).mean(dim=0, keepdim=True)
        costs = costs + torch.finfo(costs.dtype).tiny  # equal shares where nothing costs anything
        return costs / costs.sum()


def aligned_entries(values, alignment):
    """values (X, M, P) at the prediction that each frame is aligned to, (X, M)."""
    return values.gather(2, alignment.unsqueeze(2)).squeeze(2)


def parse_mask_rules(text):
    """The rules of --CPCCTCMasq as pairs of slices, of matched frames and of predictions.

    text: rules `a:b:c:d` separated by commas, each number an integer or `none`; a rule stands for
    [a:b, c:d] in Python's notation. Raises ValueError for anything else.
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
    """(1, M, K) float, 1 where a frame must not match a prediction."""
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


@torch.compiler.disable  # a recursion over frames: compiling would unroll it
def soft_align(log_probs, skips_beg=0, skips_end=0, blank=NO_BLANK):
    """The cost of matching symbols to frames, over all alignments, and the likeliest alignment.

    log_probs: (X, M, P), log-probability of symbol p at frame m, not normalised over symbols. An
    alignment gives each frame a symbol, starting with the first, ending with the last, in order,
    each for one frame or several in a row. The first skips_beg symbols and the last skips_end may
    go unused: that many free frames are put before and after the others.

    blank: NO_BLANK; LEARNED_BLANK: symbol 0 is a CTC blank, which may come between any two others
    and at both ends; FORBIDDEN_BLANK: there is a blank of probability exp(FORBIDDEN), the way out
    where a mask leaves no alignment without an entry that is as unlikely.

    Returns the cost (X,), minus the log of the summed probability of all alignments, and for each
    frame its likeliest symbol (X, M) int64, by the posterior over all alignments.
    """
    n_frames, n_symbols = log_probs.shape[1:]
    if n_frames < n_symbols:
        raise ValueError(f"{n_symbols} symbols can't be aligned to {n_frames} frames")
    emissions = F.pad(log_probs.double(), (0, 0, skips_beg, skips_end)).permute(1, 2, 0)
    if blank == NO_BLANK:
        cost, occupancy = _SumOverAlignments.apply(emissions.contiguous(), False)
    else:
        if blank == FORBIDDEN_BLANK:
            emissions = F.pad(emissions, (0, 0, 1, 0), value=FORBIDDEN)
        symbol = _symbols_between_blanks(emissions.size(1), emissions.device)
        cost, state_occupancy = _SumOverAlignments.apply(emissions.index_select(1, symbol), True)
        occupancy = torch.zeros_like(emissions).index_add_(1, symbol, state_occupancy)
        if blank == FORBIDDEN_BLANK:
            occupancy = occupancy[:, 1:]
    alignment = occupancy[skips_beg : skips_beg + n_frames].argmax(dim=1).T
    return cost.to(log_probs.dtype), alignment


def _symbols_between_blanks(n_symbols, device):
    """The symbol of each state of a CTC chain: 0, 1, 0, 2, 0, ..., n_symbols - 1, 0."""
    symbol = torch.zeros(2 * n_symbols - 1, dtype=torch.long, device=device)
    symbol[1::2] = torch.arange(1, n_symbols, device=device)
    return symbol


class _SumOverAlignments(torch.autograd.Function):
    """Minus the log of the summed probability of all ways through a chain of states.

    emissions: (T, S, X), float64 log-probabilities of state s at frame t. From frame to frame a
    way stays or moves on by one state; where every other state is a blank (0, 2, ..., S - 1),
    it may also pass over a blank between two symbols. It starts in the first state and ends in
    the last; with blanks also in the second and the last but one.

    Returns the cost (X,) and the posterior probability (T, S, X) of being in each state, which is
    minus the derivative of the cost. It needs no second recursion: walking back from the last
    frame, a way that is in a state has come from its predecessors in proportion to how likely
    these were reached.
    """

    @staticmethod
    def forward(ctx, emissions, with_blanks):
        n_ends = 2 if with_blanks else 1
        # Log-probability of all ways into a state, and of these with its emission. Both are kept:
        # subtracting what was added would not give back what was there.
        entered, reached = torch.empty_like(emissions), torch.empty_like(emissions)
        entered[0, :n_ends], entered[0, n_ends:] = 0, LOG_ZERO
        torch.add(entered[0], emissions[0], out=reached[0])
        for frame in range(1, len(emissions)):
            _enter(reached[frame - 1], with_blanks, out=entered[frame])
            torch.add(entered[frame], emissions[frame], out=reached[frame])
        occupancy = torch.zeros_like(emissions)
        occupancy[-1, -n_ends:] = reached[-1, -n_ends:].softmax(dim=0)
        _walk_back(occupancy, reached, entered, with_blanks)
        ctx.save_for_backward(occupancy)
        ctx.mark_non_differentiable(occupancy)
        return -reached[-1, -n_ends:].logsumexp(dim=0), occupancy

    @staticmethod
    @once_differentiable
    def backward(ctx, cost_gradient, _):
        (occupancy,) = ctx.saved_tensors
        return -cost_gradient * occupancy, None


def _enter(reached, with_blanks, out):
    """Log-probabilities (S, X) of the ways into each state, from those of the frame before."""
    out[0] = reached[0]
    torch.logaddexp(reached[1:], reached[:-1], out=out[1:])
    if with_blanks:
        torch.logaddexp(out[3::2], reached[1:-2:2], out=out[3::2])


def _walk_back(occupancy, reached, entered, with_blanks):
    """Fill in occupancy (T, S, X) from its last frame to its first."""
    stayed = (reached[:-1] - entered[1:]).exp_()
    moved = 1 - stayed
    if with_blanks:
        passed = (reached[:-1, 1:-2:2] - entered[1:, 3::2]).exp_()
        moved[:, 3::2] -= passed
    for frame in range(len(occupancy) - 1, 0, -1):
        now, before = occupancy[frame], occupancy[frame - 1]
        torch.mul(now, stayed[frame - 1], out=before)
        before[:-1].addcmul_(now[1:], moved[frame - 1, 1:])
        if with_blanks:
            before[1:-2:2].addcmul_(now[3::2], passed[frame - 1])
