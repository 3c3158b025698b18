"""Training criteria, and the classifiers used as probes."""

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
    "tells_speakers_apart",
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
    common = {
        "dim_context": args.hiddenGar,
        "dim_encoded": args.hiddenEncoder,
        "n_frames": args.sizeWindow // SAMPLES_PER_FRAME,
        "n_negatives": args.negativeSamplingExt,
        "limit_negatives": args.limitNegsInBatch,
        "reverse": args.cpc_mode == "reverse",
        "speaker_embedding": args.speakerEmbedding,
        "n_speakers": n_speakers,
        "cosine_scores": args.normalizeCPCScore,
        "temperature": args.scoreTemperature,
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


def tells_speakers_apart(args):
    """Whether the criterion has weights for each speaker."""
    return args.speakerEmbedding > 0 or (args.supervised and not trains_on_phones(args))
