"""Show how far a command has come: a bar on a terminal, else a line now and then."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30  # where there is no terminal


class Meter:
    """Show how many of the input's bytes are read."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)
        self.total = total
        self.started = self.shown = time.monotonic()

    def show(self, done: int) -> None:
        """Show it if it is time."""
        self.bar.update(max(0, done - self.bar.n))
        now = time.monotonic()
        if self.bar.disable and now - self.shown >= SECONDS_BETWEEN_LINES:
            elapsed, self.shown = now - self.started, now
            line = tqdm.format_meter(done, self.total, elapsed, unit="B", unit_scale=True)
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        self.bar.close()


class Stopwatch:
    """Show how long a step takes that does not say how far it is."""

    def __init__(self, what: str):
        self.what = what
        self.is_terminal = sys.stderr.isatty()
        self.started: float | None = None
        self.shown = 0.0

    def start(self) -> None:
        """Begin to count."""
        self.started = self.shown = time.monotonic()

    def show(self) -> None:
        """Show the seconds if it is time: on a terminal always, in one line."""
        now = time.monotonic()
        if self.started is None or (
            not self.is_terminal and now - self.shown < SECONDS_BETWEEN_LINES
        ):
            return
        self.shown = now
        line = f"{self.what}: {now - self.started:.0f} s"
        print(line, file=sys.stderr, end="\r" if self.is_terminal else "\n", flush=True)

    def close(self) -> None:
        """End the line on a terminal."""
        if self.is_terminal and self.started is not None:
            print(file=sys.stderr)
