"""What training minimises, and the classifiers that probe what was learned."""

from criterion.classification import CTCPhoneCriterion, PhoneCriterion, SpeakerCriterion
from criterion.cpc import CPCCriterion, NoneCriterion
from criterion.prediction import CriterionOutput
from criterion.soft_align import CPCCTCCriterion, parse_mask_rules
from utils.misc import SAMPLES_PER_FRAME, UserError

__all__ = [
    "CPCCTCCriterion",
    "CPCCriterion",
    "CriterionOutput",
    "NoneCriterion",
    "build_criterion",
    "mask_rules",
]


def build_criterion(args, n_speakers, n_phones=0):
    """The criterion that the architecture flags in `args` ask for.

    n_speakers: how many speakers --speakerEmbedding or --supervised tells apart; n_phones: how
    many phones --supervised does, 0 for speakers. Raises UserError, naming the flags, where they
    can't work together.
    """
    if args.supervised:
        return _build_classifier(args, n_speakers, n_phones)
    if args.cpc_mode == "none":
        return NoneCriterion()
    common = {
        "dim_context": args.hiddenGar,
        "dim_encoded": args.hiddenEncoder,
        "n_frames": args.sizeWindow // SAMPLES_PER_FRAME,
        "n_negatives": args.negativeSamplingExt,
        "limit_negatives": args.limitNegsInBatch,
        "reverse": args.cpc_mode == "reverse",
        "speaker_embedding": args.speakerEmbedding,
        "n_speakers": n_speakers,
        "rnn_mode": args.rnnMode,
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


def _build_classifier(args, n_speakers, n_phones):
    if not n_phones:
        return SpeakerCriterion(args.hiddenGar, n_speakers)
    n_features = args.hiddenEncoder if args.onEncoder else args.hiddenGar
    kind = CTCPhoneCriterion if args.CTC else PhoneCriterion
    return kind(n_features, n_phones, args.onEncoder, args.nLevelsPhone)


def mask_rules(text):
    """What `parse_mask_rules` makes of `--CPCCTCMasq`. Raises UserError, naming the flag."""
    try:
        return parse_mask_rules(text)
    except ValueError as error:
        raise UserError(f"--CPCCTCMasq: {error}") from error
