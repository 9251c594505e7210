"""Progress of long work: a bar on a terminal and in a notebook; elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm as terminal
from tqdm.auto import tqdm

EVERY = 30  # seconds between two lines


def progress_bar(total, unit, shown=None, **settings):
    """A context manager whose `update(n)` counts n more of `total`.

    - unit: what is counted, such as " draws". shown: False shows nothing.
    - settings: further ones of tqdm.
    """
    notebook = tqdm.status_printer is not terminal.status_printer
    if shown is False or notebook or sys.stderr.isatty():
        return tqdm(total=total, unit=unit, disable=shown is False, **settings)
    return Lines(total, unit, settings.get("initial", 0))


class Lines:
    """Progress as whole lines on stderr, for a file: no more often than every 30 seconds."""

    def __init__(self, total, unit, initial=0):
        self.total, self.unit, self.initial, self.count = total, unit, initial, initial
        self.begin = self.said = time.monotonic()
        self.beside = ""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, n=1):
        """Count n more."""
        self.count, now = self.count + n, time.monotonic()
        if now - self.said >= EVERY and self.count < self.total:
            self.said, spent = now, now - self.begin
            left = spent / (self.count - self.initial) * (self.total - self.count)
            times = [tqdm.format_interval(seconds) for seconds in (spent, left)]
            print(
                f"{self.count:,} of {self.total:,}{self.unit} after {times[0]}, about {times[1]} "
                f"left{self.beside}",
                file=sys.stderr,
                flush=True,
            )

    def set_postfix(self, refresh=True, **values):
        """What else the lines say."""
        self.beside = "".join(f", {name} {value}" for name, value in values.items())
