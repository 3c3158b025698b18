"""The values of a run as event files, for TensorBoard (`--tensorboard`)."""

import threading
from pathlib import Path

from utils.misc import BOUNDARY_RATE, OF_SEGMENTS
from utils.report.pictures import draw_capture, find_pictures, latest_capture
from utils.report.sections import OF_PROBES
from utils.report.values import number
from utils.run.console import Listener
from utils.run.lock import lost_lock

TAGS = {
    f"loc{short}_{part}{level}": f"{kind}/{title}{level}"
    for short, kind in (("Loss", "loss"), ("Acc", "accuracy"))
    for part, title in (("train", "training"), ("val", "validation"))
    for level in ("", OF_SEGMENTS)
} | {
    f"{BOUNDARY_RATE}_train": "boundaries_per_second/training",
    f"{BOUNDARY_RATE}_val": "boundaries_per_second/validation",
    "learningRate": "optimisation/learning_rate",
    "gradNorm_train": "optimisation/gradient_norm",
}
UNSUITABLE = str.maketrans("/ ", "__")  # in the name of a group of curves


def event_writers(state, files):
    """The listeners that `--tensorboard` asks for: one on rank 0, or none.

    state: the RunState; files: its RunFiles
    """
    asked = state.args.tensorboard and state.world.is_rank_zero
    return [EventWriter(state, files.report.stats)] if asked else []


class EventWriter(Listener):
    """Writes values, pictures and flags, over the steps of the optimiser.

    The values of an epoch are logged at the number of steps done by then, running means one step
    earlier. So a run that resumes can make TensorBoard drop everything it had logged later. An
    error costs a warning, and the rest of the curves: a run is worth more than these.
    """

    def __init__(self, state, stats):
        self.state, self.stats, place = state, stats, state.args.tensorboard
        self.directory = state.directory / "tensorboard" if place is True else Path(place)
        self.first_step, self.sent = self.steps, set()
        if self.steps and not state.epoch_means.batches:  # the last epoch's values are valid
            self.first_step += 1
        self.writer, self.failed = None, False

    @property
    def steps(self):
        """Steps that the optimiser has done, in all epochs."""
        done = sum(number(n) or 0 for n in self.state.logs.get("iter", []))
        return int(done) + self.state.epoch_means.batches

    def on_step(self, epoch, batch, n_batches, values, clock):
        self.write(self.steps - 1, {f"{tag}_running": v for tag, v in self.scalars(values)})

    def on_epoch(self, epoch, values, clock):
        scalars, logs = dict(self.scalars(values)), None
        if "locLoss_val" in values:
            scalars["epoch"] = epoch
            scalars["speed/windows_per_second"] = clock.windows / max(clock.seconds, 1e-9)
        else:  # a hook's own, with pictures
            logs = {"epoch": [epoch], **{key: [value] for key, value in values.items()}}
        self.write(self.steps, scalars, logs)

    def scalars(self, values):
        """Yield (tag, number) for numbers, means of lists and, in validation, items of these."""
        networks = self.state.networks
        for key, value in values.items():
            is_meaningless = key.startswith("locAcc") and not networks.has_accuracy
            if key == "iter" or is_meaningless or number(value) is None:
                continue
            tag = TAGS.get(key) or tag_of(key)
            yield tag, number(value)
            if key in TAGS and "_val" in key and isinstance(value, list) and len(value) > 1:
                by_step = f"{tag} by {networks.step_name}".translate(UNSUITABLE)
                yield from ((f"{by_step}/{n:02}", v) for n, v in enumerate(value, 1))

    def write(self, step, scalars, logs=None):
        """Write scalars; logs: those of one epoch, whose pictures are written as well."""
        if self.failed or lost_lock():
            return
        try:
            with self.state.world.stop.deferred():
                self.writer = self.writer or self.open()
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, step)
                if logs:
                    self.add_pictures(logs, step)
                self.writer.flush()
        except Exception as error:
            self.failed = True
            print(f"warning: {self.directory}: no more curves for TensorBoard ({error})")

    def open(self):
        """A SummaryWriter that continues the curves of an earlier call, with the run's flags."""
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = without_event_files(threading.excepthook)
        writer = SummaryWriter(self.directory, purge_step=self.first_step)
        flags = (f"    --{name} {value}" for name, value in vars(self.state.args).items())
        writer.add_text("flags", "\n".join(flags), self.first_step)
        if self.first_step == 0:
            for tag, value in self.scalars(self.state.logs.get("before_training", {})):
                writer.add_scalar(tag, value, 0)
        return writer

    def add_pictures(self, logs, step):
        """Add the pictures of an epoch that weren't added before."""
        from matplotlib.image import imread

        capture = latest_capture(logs, self.state.args)
        if capture and capture not in self.sent:
            draw_capture(capture)
            self.sent.add(capture)
        for group, _, path in find_pictures(logs, self.state.args, self.stats, capture):
            if path not in self.sent:
                self.sent.add(path)
                name = path.stem.removesuffix(f"_{logs['epoch'][0]}")
                kind = group if group in ("probes", "capture") else "stats"
                self.writer.add_image(f"{kind}/{name}", imread(path), step, dataformats="HWC")


def without_event_files(hook):
    """`hook`, for all threads but those that write event files: `flush` raises their errors."""

    def excepthook(error):
        if not type(error.thread).__module__.startswith("tensorboard."):
            hook(error)

    return excepthook


def tag_of(key):
    """The tag of a value that a hook logs as `key`."""
    if OF_PROBES.fullmatch(key):
        return f"probes/{key}"
    return key.replace("units_", "units/", 1) if key.startswith("units_") else f"stats/{key}"
