"""The flags of train.py about two levels, of frames and of segments, and the rules between them.

Names and defaults are those of hCPC, the program of Cuervo et al. (2021, 2022).
"""

import argparse
from functools import partial

from utils.misc import BOUNDARY_RATE, SAMPLES_PER_FRAME, UserError
from utils.run.command import above, at_least, refuse_any

HEADING = "two levels"
LEARNED = "boundaryPredictor"
SEGMENTATION_MODES = ("cosineDissimilarity", "scpc", LEARNED)
RL_SETUPS = ("reinforceWBaseline", "vanillaReinforce", "reinforceWAdvantage")
PREDICTED = "predicted"  # whether a batch has segments to predict; not in the logs
OF_POLICY = ("piGradLoss", "SegmenterEntropyLoss", "PhoneDensityPriorLoss", BOUNDARY_RATE)
OF_CODES = ("targetQuantizerLoss",)
MEAN_PHONE = 7.580728  # frames, in LibriSpeech
ONE_COPY = "segments have one copy of the audio: use --past_equal_future, or leave it out"
REFUSED_MODES = {  # those of hCPC
    "collapseRepetitions": "needs quantised frames, which aren't supported",
    "groundTruth": "segments of labels (groundTruth...) aren't supported",
}
_OF_QUANTISERS = "belongs to quantised features, which aren't supported"
REFUSED = {  # flags of hCPC -> why
    "segmentCompression": "segments are always the means of their frames; leave it out",
    "targetQuantizer": _OF_QUANTISERS,
    "encodingsQuantizer": _OF_QUANTISERS,
    "contextQuantizer": _OF_QUANTISERS,
    "numGroupsCodebook": "a vector has one code; leave it out",
    "sincNet": "an encoder of sinc filters isn't supported; --encoder_type lfb learns filters",
    "useKreukLoss": "isn't supported; --rnnMode none --arMode no_ar --nPredicts 1 "
    "--negativeSamplingExt 1 --normalizeCPCScore is the loss of Kreuk et al.",
    "predictClusterIds": "isn't supported",
    "restartEpochCount": "isn't supported: --load starts a new run from a checkpoint's weights",
    "NoARonRegHead": "had no effect in hCPC either; leave it out",
}  # fmt: skip


class Refused(argparse.Action):
    """A flag that this program doesn't have; `const` is the reason."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"{option_string}: {self.const}")


def add_refused(add):
    """Make the parser refuse the flags of hCPC that aren't supported, each by its name."""
    for name, reason in REFUSED.items():
        hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        add(f"--{name}", action=Refused, nargs="*", const=reason, **hidden)


def segmentation_mode(text):
    """A value of --segmentationMode, checked."""
    for mode, reason in REFUSED_MODES.items():
        if text.startswith(mode):
            raise argparse.ArgumentTypeError(f"{text}: {reason}")
    if text not in SEGMENTATION_MODES:
        raise argparse.ArgumentTypeError(f"{text}: there are {', '.join(SEGMENTATION_MODES)}")
    return text


# A flag on two lines reads better than on seven, hence:
# fmt: off


def declare_levels(declare, architecture, inherited, model, cpcctc, heads):
    """Declare the flags; architecture to cpcctc: sets of flags; heads: choices of --rnnMode."""
    add = partial(declare, HEADING, on_resume=architecture, also=model)
    add("--multiLevel", action="store_true", help="a second level of CPC above the frames, on "
        "segments of them (Cuervo et al. 2021): find segments, take their means, encode and "
        "predict these. The loss of segments trains the encoder, too")
    add("--segmentationMode", type=segmentation_mode, default="cosineDissimilarity", metavar="MODE",
        help="where segments begin: cosineDissimilarity: at prominent peaks of the cosine distance "
        "of neighbouring encoded frames, scaled to 0..1 in each window; scpc: where it is higher "
        "than one and two frames away (Bhati et al., Interspeech 2021); boundaryPredictor: where a "
        "policy trained by REINFORCE decides (Cuervo et al. 2022)")
    add("--segmentProminence", type=above(0), default=0.05, metavar="P", help="prominence of the "
        "smallest peak that is a boundary; with scpc the height above its neighbours")
    add("--segmentOnContext", action="store_true",
        help="find segments in contexts, and take the means of these, instead of encoded frames")
    add("--noSegmentation", action="store_true", help="each frame is a segment, for comparison")
    add("--hiddenEncoderSegment", type=at_least(1), default=256, metavar="E",
        help="channels of the segment encoder")
    add("--hiddenGarSegment", type=at_least(1), default=256, metavar="C",
        help="channels of the LSTM over segments")
    add("--nLayersBoundaryPredictor", type=at_least(1), default=1, metavar="N",
        help="transformer layers of that policy")
    add = partial(declare, HEADING, on_resume=architecture)
    add("--rlSetup", choices=RL_SETUPS, default=RL_SETUPS[0], help="how the losses of segments "
        "reach the policy: each window's mean, minus a running mean of all (reinforceWBaseline) or "
        "as it is (vanillaReinforce), or each segment's own, minus that running mean")
    add("--meanSegment", type=above(0), default=MEAN_PHONE, metavar="FRAMES",
        help="mean segment length that the policy is trained towards: that of LibriSpeech's phones")
    add("--policyWeights", nargs="+", type=at_least(0, float), default=[1.0] * 3, metavar="W",
        help="weights of the policy's three losses: piGradLoss (REINFORCE), SegmenterEntropyLoss "
        "and PhoneDensityPriorLoss, whose gradients reach the encoder as well")
    add("--targetQuantizerSegment", type=target_quantizer, default="none", metavar="KIND",
        help="robustKmeans: from epoch 3 (the fourth) on, each segment to predict is replaced by "
        "the nearest of several codes, which k-means finds at the start of epochs 3 to 49")
    add("--numCodesCodebook", type=at_least(2), default=512, metavar="N",
        help="number of these codes")
    declare(HEADING, "--codebookLearningRate", on_resume=inherited, type=at_least(0, float),
        default=2e-3, metavar="RATE", help="learning rate of the codes")
    add("--nPredictsSegment", type=at_least(1), default=1, metavar="K",
        help="predictions made from each segment")
    add("--CPCCTCNumMatchedSegment", type=at_least(1), default=1, also=cpcctc, metavar="M",
        help="segments that the predictions are aligned to (needs --CPCCTC)")
    add("--negativeSamplingExtSegment", type=at_least(1), default=1, metavar="N",
        help="negatives drawn for each segment")
    add("--adjacentNegatives", action="store_true", help="instead of these, one negative for each "
        "prediction: the segment before or after the one to predict; prediction k is segment k")
    add("--rnnModeSegment", choices=heads, default="transformer",
        help="prediction heads of segments, see --rnnMode")
    add("--headWeights", nargs="+", type=at_least(0, float), default=[1.0, 1.0], metavar="W",
        help="weights of the loss of frames and that of segments, each a mean over its predictions "
        "(or matched frames); the sum is divided by the number of levels")
    add("--segmentLevel", action="store_true",
        help="train with the loss of segments only, which is the loss in the logs")
    add("--freezeFrameModel", action="store_true",
        help="the same, with the frame level kept as it was loaded")


# fmt: on


def target_quantizer(text):
    """A value of --targetQuantizerSegment, checked."""
    if text not in ("none", "robustKmeans"):
        raise argparse.ArgumentTypeError(f"{text}: isn't supported; there are none, robustKmeans")
    return text


def learns_boundaries(args):
    """Whether a policy learns where segments begin."""
    return args.multiLevel and args.segmentationMode == LEARNED and not args.noSegmentation


def further_losses(args):
    """Names, in the logs, of the losses of learned boundaries and of codes for segments, and of
    numbers that aren't minimised, such as boundaries per second."""
    learns_codes = args.multiLevel and args.targetQuantizerSegment != "none"
    return (*OF_POLICY, PREDICTED) * learns_boundaries(args) + OF_CODES * learns_codes


def complete_levels(args, explicit):
    """Set what follows from other flags."""
    if args.adjacentNegatives and "CPCCTCNumMatchedSegment" not in explicit:
        args.CPCCTCNumMatchedSegment = args.nPredictsSegment


def check_levels(args, explicit, of_levels, resumed):
    """Refuse what can't work; of_levels: names of the flags of two levels."""
    if not args.multiLevel:
        refuse_any(explicit & of_levels - {"multiLevel"}, "needs --multiLevel")
        if args.level == "segments":
            raise UserError("--level segments needs --multiLevel")
        return
    for name, value in (("supervised", args.supervised), ("cpc_mode", args.cpc_mode)):
        if value:
            raise UserError(f"--multiLevel can't be used with --{name}")
    if args.speakerEmbedding:
        raise UserError("--speakerEmbedding isn't supported with --multiLevel: leave it out")
    if args.augment_type and not args.past_equal_future:
        raise UserError(f"--augment_type: with --multiLevel, {ONE_COPY}")
    check_segment_level(args, explicit)
    if len(args.headWeights) != 2:
        raise UserError("--headWeights needs two values: of frames and of segments")
    if args.load and len(args.load) > 1:
        raise UserError("--multiLevel: its frame level comes from one checkpoint; --load several")
    if args.freezeFrameModel and not args.load and not resumed:
        raise UserError("--freezeFrameModel needs --load CHECKPOINT, the model that is frozen")


def check_segment_level(args, explicit):
    if args.noSegmentation:
        refuse_any(
            explicit & {"segmentationMode", "segmentProminence"},
            "has no effect with --noSegmentation",
        )
    if args.targetQuantizerSegment == "none":
        of_codes = {"numCodesCodebook", "codebookLearningRate"}
        refuse_any(explicit & of_codes, "needs --targetQuantizerSegment robustKmeans")
    check_policy(args, explicit)
    if args.adjacentNegatives:
        refuse_any(
            explicit & {"CPCCTCNumMatchedSegment", "negativeSamplingExtSegment"},
            "has no effect with --adjacentNegatives",
        )
    predictions, matched = args.nPredictsSegment, args.CPCCTCNumMatchedSegment
    if args.CPCCTC and predictions > matched:
        raise UserError(
            f"--nPredictsSegment {predictions}: can't be aligned to --CPCCTCNumMatchedSegment "
            f"{matched} segments; give at most as many predictions as matched segments"
        )
    frames = args.sizeWindow // SAMPLES_PER_FRAME
    if max(predictions, matched) + args.adjacentNegatives >= frames:
        raise UserError(
            f"--sizeWindow {args.sizeWindow}: its {frames} frames are too few to look "
            f"{max(predictions, matched)} segments ahead (--nPredictsSegment, "
            "--CPCCTCNumMatchedSegment)"
        )
    widths = args.hiddenGarSegment, args.hiddenEncoderSegment
    if args.rnnModeSegment in ("transformer", "none") and widths[0] != widths[1]:
        raise UserError(
            f"--rnnModeSegment {args.rnnModeSegment} needs --hiddenGarSegment ({widths[0]}) and "
            f"--hiddenEncoderSegment ({widths[1]}) to be equal; or choose another, such as linear"
        )
    if args.rnnModeSegment == "transformer" and widths[0] % 8:
        raise UserError(
            f"--hiddenEncoderSegment {widths[1]}: --rnnModeSegment transformer has 8 attention "
            "heads, so it must be a multiple of 8"
        )
    if args.rnnModeSegment == "none" and predictions > 1:
        raise UserError(
            "--rnnModeSegment none: the context itself is the only prediction, so "
            f"--nPredictsSegment must be 1, not {predictions}"
        )


def check_policy(args, explicit):
    """Refuse what can't work with learned boundaries or, without them, what only they use."""
    if not learns_boundaries(args):
        of_policy = {"nLayersBoundaryPredictor", "rlSetup", "meanSegment", "policyWeights"}
        refuse_any(explicit & of_policy, f"needs --segmentationMode {LEARNED}")
        return
    if len(args.policyWeights) != 3:
        raise UserError("--policyWeights needs three values: of REINFORCE, entropy and density")
    refuse_any(explicit & {"segmentProminence"}, f"has no effect with --segmentationMode {LEARNED}")
    flag = "hiddenGar" if args.segmentOnContext else "hiddenEncoder"
    if getattr(args, flag) % 8:
        raise UserError(
            f"--{flag} {getattr(args, flag)}: --segmentationMode {LEARNED} has 8 attention heads, "
            "so it must be a multiple of 8"
        )
