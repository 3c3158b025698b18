"""The files that people read beside a run's checkpoints: logs, curves and report."""

from utils.files import save_json
from utils.report.page import REPORT, RunReport
from utils.report.plots import draw_curves
from utils.report.run_record import machine_in_words
from utils.run.flags import build_parser
from utils.run.pace import Pace

LOGS = "checkpoint_logs.json"
CURVES = "checkpoint_curves.png"
SECONDS_BETWEEN_PICTURES = 60.0


class RunFiles:
    """Writes them after each epoch: curves and report at most once a minute, and at the end.

    state: the RunState; argv: the command line of this call; sets: training and validation
    AudioDataset; labels: PhoneLabels or None; stats: StatsCollector.
    """

    def __init__(self, state, argv, sets, labels, stats):
        self.directory, networks = state.directory, state.networks
        self.step_name, self.has_accuracy = networks.step_name, networks.has_accuracy
        self.chance = networks.chance
        self.pace = Pace(SECONDS_BETWEEN_PICTURES)
        self.report = RunReport(
            state.args,
            build_parser().parse_args([]),
            ["python", "train.py", *argv],
            sets,
            labels,
            stats.directories,
            machine_in_words(state.device, state.world.size),
            step_name=self.step_name,
            has_accuracy=self.has_accuracy,
            chance=self.chance,
        )

    def write(self, logs, speed=None, if_due=False):
        """Write all of them; speed: the `epoch_speed` of the last epoch.

        if_due: curves and report only if the last ones are old enough. A failure to write only
        costs a warning: a run is worth more than its pictures.
        """
        try:
            if logs["epoch"]:
                save_json(self.directory / LOGS, logs)
            if if_due and not self.pace.is_due:
                self.report.put_off(logs, speed)
                return
            with self.pace.timed():
                if logs["epoch"]:
                    what = self.step_name, self.has_accuracy, self.chance
                    draw_curves(logs, self.directory / CURVES, *what)
                self.report.write(logs, speed)
        except OSError as error:
            print(f"warning: {self.directory}: logs and pictures not written ({error})")

    def complete(self, logs, stop):
        """Write what was put off, or what a killed run didn't write."""
        if logs["epoch"] and not self.report.covers(logs["epoch"][-1]):
            with stop.deferred():
                self.write(logs)

    def places(self):
        """Name -> path of the files to look at."""
        curves, report = self.directory / CURVES, self.directory / REPORT
        return {"checkpoints, logs": self.directory, "curves": curves, "report": report}
