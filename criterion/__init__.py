"""Training criteria, and the classifiers used as probes."""

from criterion.classification import CTCPhoneCriterion, PhoneCriterion, SpeakerCriterion
from criterion.cpc import CPCCriterion, NoneCriterion
from criterion.networks import Networks
from criterion.prediction import CriterionOutput
from criterion.soft_align import CPCCTCCriterion, parse_mask_rules
from utils.misc import SAMPLES_PER_FRAME, UserError
from utils.run.level_flags import further_losses

__all__ = [
    "CPCCTCCriterion",
    "CPCCriterion",
    "CriterionOutput",
    "NoneCriterion",
    "build_criterion",
    "has_speaker_weights",
    "join_networks",
    "mask_rules",
    "trains_on_phones",
]


def build_criterion(args, n_speakers, n_phones=0):
    """The criterion that the architecture flags in `args` describe.

    n_speakers: number of speakers, for --speakerEmbedding and --supervised; n_phones: number of
    phones for --supervised, 0 to classify speakers. Raises UserError, naming the flags, if they
    contradict each other.
    """
    if args.supervised:
        return _build_classifier(args, n_speakers, n_phones)
    if args.cpc_mode == "none":
        return NoneCriterion()
    if args.multiLevel:
        from criterion.levels import LevelCriteria  # one level needn't import it

        frames_train = not args.segmentLevel and not args.freezeFrameModel
        levels = _of_frames(args, n_speakers) if frames_train else None, _of_segments(args)
        if further_losses(args):
            from criterion.learned_levels import add_parts

            add_parts(levels[1], args)
        return LevelCriteria(*levels)
    return _of_frames(args, n_speakers)


def _of_frames(args, n_speakers):
    common = _common(args) | {
        "dim_context": args.hiddenGar,
        "dim_encoded": args.hiddenEncoder,
        "n_negatives": args.negativeSamplingExt,
        "limit_negatives": args.limitNegsInBatch,
        "reverse": args.cpc_mode == "reverse",
        "speaker_embedding": args.speakerEmbedding,
        "n_speakers": n_speakers,
        "rnn_mode": args.rnnMode,
        "shared_head": args.multihead_rnn,
        "dropout": args.dropout,
    }
    if not args.CPCCTC:
        return CPCCriterion(args.nPredicts, **common)
    return CPCCTCCriterion(
        args.nPredicts,
        args.CPCCTCNumMatched,
        skips_beg=args.CPCCTCSkipBeg,
        skips_end=args.CPCCTCSkipEnd,
        self_loop=args.CPCCTCSelfLoop,
        learn_blank=args.CPCCTCLearnBlank,
        no_negatives_in_match_window=args.CPCCTCNoNegsMatchWin,
        mask_rules=mask_rules(args.CPCCTCMasq),
        loss_temperature=args.CPCCTCLossTemp,
        normalize_encodings=args.CPCCTCNormalizeEncs,
        normalize_predictions=args.CPCCTCNormalizePreds,
        **common,
    )


def _of_segments(args):
    common = _common(args) | {
        "dim_context": args.hiddenGarSegment,
        "dim_encoded": args.hiddenEncoderSegment,
        "n_negatives": args.negativeSamplingExtSegment,
        "rnn_mode": args.rnnModeSegment,
    }
    if args.CPCCTC and not args.adjacentNegatives:
        return CPCCTCCriterion(args.nPredictsSegment, args.CPCCTCNumMatchedSegment, **common)
    # With adjacent negatives, each prediction matches one segment: nothing to align.
    adjacent = args.adjacentNegatives
    return CPCCriterion(args.nPredictsSegment, adjacent_negatives=adjacent, **common)


def _common(args):
    return {
        "n_frames": args.sizeWindow // SAMPLES_PER_FRAME,
        "cosine_scores": args.normalizeCPCScore,
        "temperature": args.scoreTemperature,
    }


def _build_classifier(args, n_speakers, n_phones):
    if not n_phones:
        return SpeakerCriterion(args.hiddenGar, n_speakers)
    n_features = args.hiddenEncoder if args.onEncoder else args.hiddenGar
    kind = CTCPhoneCriterion if args.CTC else PhoneCriterion
    return kind(n_features, n_phones, args.onEncoder, args.nLevelsPhone)


def mask_rules(text):
    """`parse_mask_rules` of --CPCCTCMasq. Raises UserError, naming the flag."""
    try:
        return parse_mask_rules(text)
    except ValueError as error:
        raise UserError(f"--CPCCTCMasq: {error}") from error


def trains_on_phones(args):
    return args.supervised and args.path_phone_data is not None


def has_speaker_weights(args):
    """Whether the criterion has weights for each speaker."""
    return args.speakerEmbedding > 0 or (args.supervised and not trains_on_phones(args))


def join_networks(criterion, model, args):
    """The Networks of a criterion and a model, or LevelNetworks if they have two levels."""
    if not args.multiLevel:
        return Networks(criterion, model)
    from criterion.levels import LevelNetworks, freeze_unreached

    freeze_unreached(criterion, model, args)
    if not further_losses(args):
        return LevelNetworks(criterion, model, args.headWeights)
    from criterion.learned_levels import LearnedNetworks

    return LearnedNetworks(criterion, model, args)
