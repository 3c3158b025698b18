"""The tensors that the flags of a run ask to capture."""

from utils.run.flags import CAPTURED_BY


def capturable_names(args):
    """Names of all tensors that can be captured in a run with these flags."""
    available = ["conv_repr", "ctx_repr", "speaker_align"]
    if args.multiLevel:
        available += ["seg_boundaries", "seg_conv", "seg_ctx"]
    if args.path_phone_data:
        available.append("phone_align")
    if predicts_frames(args):
        available.append("pred")
        if args.CPCCTC:
            available += ["cpcctc_align", "cpcctc_log_scores"]
    return available


def predicts_frames(args):
    """Whether the criterion predicts frames."""
    frames_train = args.cpc_mode != "none" and not args.supervised
    return frames_train and not args.segmentLevel and not args.freezeFrameModel


def captured_names(args):
    """Names of the tensors to capture, in a fixed order."""
    if args.captureEverything:
        return capturable_names(args)
    return [name for flag, name in CAPTURED_BY.items() if getattr(args, flag)]
