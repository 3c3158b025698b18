"""Two levels that also learn boundaries (boundary_policy.py) or codes for segments."""

import torch

from criterion import reinforce
from criterion.levels import LevelNetworks
from criterion.quantised_targets import RobustKmeans
from utils.misc import OF_SEGMENTS, SAMPLE_RATE, SAMPLES_PER_FRAME, generator_from
from utils.run.level_flags import PREDICTED, further_losses, learns_boundaries

FRAMES_PER_SECOND = SAMPLE_RATE / SAMPLES_PER_FRAME


def add_parts(criterion, args):
    """Add the parts that the segment criterion has in checkpoints of hCPC, under the same names."""
    if learns_boundaries(args):
        criterion.register_buffer("baseline", torch.zeros(1))
    if args.targetQuantizerSegment != "none":
        criterion.targetQuantizer = RobustKmeans(args.hiddenEncoderSegment, args.numCodesCodebook)


class LearnedNetworks(LevelNetworks):
    """After the losses of the levels come those of the policy, weighted by --policyWeights, the
    number of boundaries per second, with weight 0, and that of the codes, with weight 1; in the
    logs, they have hCPC's names."""

    def __init__(self, criterion, model, args):
        super().__init__(criterion, model, args.headWeights)
        self.args, self.more = args, further_losses(args)
        self.learns_boundaries = learns_boundaries(args)
        self.learns_codes = hasattr(criterion.segmentLevelCriterion, "targetQuantizer")
        of_policy = [*args.policyWeights, 0.0, 0.0] * self.learns_boundaries
        weights = torch.tensor([[*of_policy, *[1.0] * self.learns_codes]])
        self.loss_weights = torch.cat([self.loss_weights, weights], dim=1)

    def forward(self, batch, generator=None):
        """A `Batch` -> losses and accuracies, (1, n) each; losses without accuracy get 0."""
        progress, of_segments = self.progress(), self.criterion.segmentLevelCriterion
        self.prepare(progress)
        frames, segments = self.both_levels(batch)
        losses_of_codes = []
        if self.learns_codes:
            vectors, lengths = segments.encoded, segments.lengths
            targets, loss = of_segments.targetQuantizer(vectors, lengths, progress.epoch)
            segments, losses_of_codes = segments._replace(encoded=targets), [loss]
        capture = {"anchor_costs"} if self.learns_boundaries else frozenset()
        outputs = self.criterion.of_both(frames, segments, batch.speaker, generator, capture)
        losses, accuracies, *_ = zip(*outputs, strict=True)
        more = losses_of_codes
        if self.learns_boundaries:
            costs = outputs[-1].captured["anchor_costs"]
            more = [*self.losses_of_policy(segments, costs, progress.epoch, generator), *more]
        more = torch.stack(more).view(1, -1).to(losses[0].dtype)
        no_accuracies = torch.zeros_like(more).detach()
        return torch.cat([*losses, more], 1), torch.cat([*accuracies, no_accuracies], 1)

    def prepare(self, progress):
        """Set what depends on the progress of training."""
        if self.learns_boundaries:
            self.model.segmenter.boundaryPredictor.anneal(progress.steps)
        if self.learns_codes and self.training and progress.steps_in_epoch == 0:
            generator = generator_from(self.args.random_seed, "codes", progress.epoch)
            quantiser = self.criterion.segmentLevelCriterion.targetQuantizer
            quantiser.begin_epoch(progress.epoch, generator)

    def losses_of_policy(self, segments, costs, epoch, generator):
        """The values named in OF_POLICY; costs: (X,), one per anchor."""
        choice, of_segments = segments.choice, self.criterion.segmentLevelCriterion
        if self.training:
            reinforce.update_baseline(of_segments.baseline, costs)
        n_anchors = (segments.lengths - of_segments.n_future).clamp(min=0)
        log_probs = reinforce.log_probs_of_segments(choice)
        options = (log_probs, costs, n_anchors, of_segments.baseline)
        windows = reinforce.draw_windows(choice.actions.shape, costs.device, generator)
        weight = reinforce.entropy_weight(epoch, self.training)
        return [
            reinforce.policy_gradient_loss(self.args.rlSetup, *options),
            reinforce.entropy_loss(choice.log_probs, weight),
            reinforce.density_loss(choice.log_probs[..., 1].exp(), windows, self.args.meanSegment),
            FRAMES_PER_SECOND * choice.boundaries[:, 1:].float().mean(),
            costs.new_tensor(float(len(costs) > 0)),
        ]

    def named(self, part, losses, accuracies):
        """See Networks. Means of segments are over the batches with segments to predict, or None
        if there were none."""
        n = len(losses) - len(self.more)
        more = dict(zip(self.more, losses[n:], strict=True))
        predicted = more.pop(PREDICTED, 1.0)
        values = super().named(part, losses[:n], accuracies[:n])
        for name in values:
            if name.endswith(OF_SEGMENTS):
                values[name] = [mean / predicted for mean in values[name]] if predicted else None
        return values | {f"{name}_{part}": value for name, value in more.items()}
