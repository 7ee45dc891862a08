"""How long a training is: a number of steps, or fewer if its minutes end before.

With minutes, the number of steps that they allow is estimated again about once a second, from the
speed so far, and the learning-rate schedule follows it. So the schedule reaches its end when the
time does, whatever happens to the speed. All ranks compute it from seconds that they agree on.
"""

import math
import time
from dataclasses import replace

from ds_deberta.optim import OptimConfig, warmup_steps

_LONGEST_WARMUP = 0.25  # of the steps that the minutes allow


class Horizon:
    """The end of a training.

    Args:
        most_steps: optimizer steps, at most.
        max_minutes: of training, evaluations and checkpoints on the way included; None: no limit.
    """

    def __init__(self, most_steps: int, max_minutes: float | None = None) -> None:
        self.is_timed = max_minutes is not None
        self.total_steps = most_steps
        """Optimizer steps of the whole training, as far as is known now."""
        self._most_steps = most_steps
        self._limit = math.inf if max_minutes is None else 60 * max_minutes
        self._used = self._at_start = 0.0  # seconds
        self._started: float | None = None
        # What the speed is measured over: all but the first steps of each start, which are slow.
        self._steps, self._seconds = 0, 0.0
        self._last: tuple[int, float] | None = None

    def resume(self, step: int, seconds: float) -> None:
        """Go on from a step that was reached after so many seconds; 0: not known."""
        self._used = self._at_start = seconds
        self._steps, self._seconds = (step, seconds) if seconds else (0, 0.0)
        self._estimate(step)

    def start(self) -> None:
        """Start the clock of this process."""
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """What has been used so far, over all starts."""
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return max(self._used, self._at_start + running)

    def fit(self, step: int, seconds: float) -> None:
        """Estimate `total_steps`, after `step`; all ranks with the same `seconds`."""
        self._used = seconds
        if self._last is not None:
            self._steps += step - self._last[0]
            self._seconds += seconds - self._last[1]
        self._last = step, seconds
        self._estimate(step)

    @property
    def longest_warmup(self) -> float:
        """Steps after which a warm-up ends, however many it was set to."""
        return _LONGEST_WARMUP * self.total_steps if self.is_timed else math.inf

    def fitted(self, optim: OptimConfig) -> OptimConfig:
        """The schedule's settings, with a warm-up that is short enough for a short run."""
        if not self.is_timed:
            return optim
        longest = int(self.longest_warmup)
        return replace(optim, warmup=min(warmup_steps(optim, self.total_steps), longest))

    def _estimate(self, step: int) -> None:
        if not self.is_timed:
            return
        left = self._limit - self._used
        if left <= 0:
            self.total_steps = step
        elif self._steps and self._seconds:
            steps_left = math.ceil(left * self._steps / self._seconds)
            self.total_steps = min(self._most_steps, step + steps_left)
