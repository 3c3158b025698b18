"""The pace of work that keeps a run waiting, such as saving."""

import contextlib
import time


class Pace:
    """When work is due again: `seconds` after it was last done, or later if it takes long.

    share: the largest fraction of a run's time that it may take; now: a clock, in seconds.
    """

    def __init__(self, seconds, share=0.01, now=time.monotonic):
        self.seconds, self.share, self.now = seconds, share, now
        self.due_at = now() + seconds

    @property
    def is_due(self):
        return self.now() >= self.due_at

    @contextlib.contextmanager
    def timed(self):
        """A block that does the work."""
        begun = self.now()
        try:
            yield
        finally:
            ended = self.now()
            self.due_at = ended + max(self.seconds, (ended - begun) / self.share)
