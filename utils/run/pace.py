"""How often something is done that keeps a run waiting."""

import contextlib
import time


class Pace:
    """When something is due again: `seconds` after it was done last, or later if it takes long.

    share: the most of a run's time that it may take; now: a clock, in seconds.
    """

    def __init__(self, seconds, share=0.01, now=time.monotonic):
        self.seconds, self.share, self.now = seconds, share, now
        self.due_at = now() + seconds

    @property
    def is_due(self):
        return self.now() >= self.due_at

    @contextlib.contextmanager
    def timed(self):
        """A block that does it."""
        begun = self.now()
        try:
            yield
        finally:
            ended = self.now()
            self.due_at = ended + max(self.seconds, (ended - begun) / self.share)
