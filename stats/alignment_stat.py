"""How CPC-CTC shares out the frames among its predictions."""

import torch

from stats.arguments import picture_directory
from stats.empty_stat import Stat
from stats.pictures import new_figure, save_picture
from utils.capture import prediction_names


class AlignmentOccupancyStat(Stat):
    """How many of the matched frames each prediction of CPC-CTC takes.

    A window of M matched frames is aligned to the predictions, in their order; an occupancy of
    about one frame each means that CPC-CTC does what plain CPC would. Logged: `frames_<name>`, the
    mean number of frames that a prediction takes; `self_loop` and `skipped_frames`, the shares of
    frames that the self loop and the learned blank take (0 without them); `skipped_predictions`,
    the share of the other predictions that take no frame, which the most likely prediction of each
    frame may well leave (it is no path), and `--CPCCTCSkipBeg` and `--CPCCTCSkipEnd` favour.
    The picture shows the means, and where in the matched window each prediction is.

    The value: {"windows": number of alignments, "frames": (M, P) counts, "used": (P,) counts}.
    """

    arguments = ("DIRECTORY",)
    needs = frozenset({"cpcctc_align"})

    def __init__(self, directory):
        self.directory = picture_directory(directory)

    def getStatName(self):
        return "alignOccupancy"

    def computeForBatch(self, batch):
        align = batch["cpcctc_align"].flatten(0, 1)  # (B * W, M)
        windows, matched = align.shape
        n_predictions = max(self._n_predictions(), int(align.max()) + 1)
        taken = torch.arange(matched, device=align.device) * n_predictions + align
        frames = taken.flatten().bincount(minlength=matched * n_predictions)
        used = torch.zeros(windows, n_predictions, dtype=torch.int64, device=align.device)
        used.scatter_(1, align, 1)
        return {
            "windows": windows,
            "frames": frames.view(matched, n_predictions).cpu(),
            "used": used.sum(0).cpu(),
        }

    def _n_predictions(self):
        """P, as far as the flags of the run tell."""
        extra = ("CPCCTCLearnBlank", "CPCCTCSelfLoop")
        return self.flags.get("nPredicts", 0) + sum(bool(self.flags.get(flag)) for flag in extra)

    def mergeStatResults(self, prev, current):
        width = max(len(prev["used"]), len(current["used"]))
        return {
            "windows": prev["windows"] + current["windows"],
            "frames": _widened(prev["frames"], width) + _widened(current["frames"], width),
            "used": _widened(prev["used"], width) + _widened(current["used"], width),
        }

    def logStat(self, statValue, epochNr):
        windows, frames = statValue["windows"], statValue["frames"].double()
        names = prediction_names(frames.shape[1], self.flags)
        share = dict(zip(names, (frames.sum(0) / frames.sum()).tolist(), strict=True))
        mean_frames = frames.sum(0) / windows
        predictions = [p for p, name in enumerate(names) if name not in ("blank", "self")]
        skipped = 1 - statValue["used"][predictions].double().mean() / windows
        figure = self._draw(names, mean_frames.numpy(), (frames / windows).numpy(), epochNr)
        save_picture(self.directory, f"{self.getStatName()}_{epochNr}", figure)
        return {
            "self_loop": share.get("self", 0.0),
            "skipped_frames": share.get("blank", 0.0),
            "skipped_predictions": skipped.item(),
            **{f"frames_{name}": n for name, n in zip(names, mean_frames.tolist(), strict=True)},
        }

    def _draw(self, names, mean_frames, shares, epoch):
        figure = new_figure(f"Frames that each prediction takes, epoch {epoch}", width=11)
        bars, image = figure.subplots(1, 2)
        drawn = bars.bar(names, mean_frames, color="tab:blue")
        bars.bar_label(drawn, fmt="%.2f", fontsize="small")
        bars.set(xlabel="prediction", ylabel="frames in a matched window, mean")
        matrix = image.imshow(shares.T, aspect="auto", origin="lower", vmin=0, vmax=1)
        image.set_yticks(range(len(names)), names)
        image.set_xticks(range(len(shares)), range(1, len(shares) + 1))
        image.set(xlabel="matched frame (10 ms each, after the current one)", ylabel="prediction")
        figure.colorbar(matrix, label="share of windows")
        return figure


def _widened(counts, width):
    return torch.nn.functional.pad(counts, (0, width - counts.shape[-1]))
