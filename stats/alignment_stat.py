"""How CPC-CTC distributes the frames among its predictions."""

import torch

from stats.arguments import picture_directory
from stats.empty_stat import Stat
from stats.pictures import new_figure, save_picture
from utils.capture import prediction_names


class AlignmentOccupancyStat(Stat):
    """The number of matched frames that are aligned to each prediction of CPC-CTC.

    The M frames matched from an anchor are aligned to the predictions in their order; an occupancy
    of about one frame each means that CPC-CTC behaves as plain CPC. Logged: `frames_<name>`, the
    mean number of frames of a prediction; `self_loop` and `skipped_frames`, the fractions of frames
    aligned to the self loop and to the learned blank (0 without them); `skipped_predictions`, the
    fraction of the other predictions without a frame. These are common since the alignment takes
    the most likely prediction of each frame (it isn't a path), and with `--CPCCTCSkipBeg` or
    `--CPCCTCSkipEnd`. The picture shows the means, and the predictions of each matched frame.

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
        """P according to the flags of the run; too low without flags."""
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
        fractions = dict(zip(names, (frames.sum(0) / frames.sum()).tolist(), strict=True))
        mean_frames = frames.sum(0) / windows
        predictions = [p for p, name in enumerate(names) if name not in ("blank", "self")]
        skipped = 1 - statValue["used"][predictions].double().mean() / windows
        figure = self._draw(names, mean_frames.numpy(), (frames / windows).numpy(), epochNr)
        save_picture(self.directory, f"{self.getStatName()}_{epochNr}", figure)
        return {
            "self_loop": fractions.get("self", 0.0),
            "skipped_frames": fractions.get("blank", 0.0),
            "skipped_predictions": skipped.item(),
            **{f"frames_{name}": n for name, n in zip(names, mean_frames.tolist(), strict=True)},
        }

    def _draw(self, names, mean_frames, fractions, epoch):
        figure = new_figure(f"Frames aligned to each prediction, epoch {epoch}", width=11)
        bars, image = figure.subplots(1, 2)
        drawn = bars.bar(names, mean_frames, color="tab:blue")
        bars.bar_label(drawn, fmt="%.2f", fontsize="small")
        bars.set(xlabel="prediction", ylabel="mean frames per anchor")
        matrix = image.imshow(fractions.T, aspect="auto", origin="lower", vmin=0, vmax=1)
        image.set_yticks(range(len(names)), names)
        image.set_xticks(range(len(fractions)), range(1, len(fractions) + 1))
        image.set(xlabel="matched frame (10 ms each, after the anchor)", ylabel="prediction")
        figure.colorbar(matrix, label="fraction of anchors")
        return figure


def _widened(counts, width):
    return torch.nn.functional.pad(counts, (0, width - counts.shape[-1]))
