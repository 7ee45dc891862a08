"""Stopping on request: SIGTERM, SIGUSR1, Ctrl-C, or a launcher that is gone.

A signal reaches one rank, or all, or, when `deepspeed` itself is the one that gets it, none.
Whoever learns of it says so when all ranks ask each other, about once a second, between two steps;
then all of them save and leave together. A second signal ends its process at once.
"""

import os
import select
import signal
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ds_deberta.distributed import has_launcher, logger, world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends some time before the end: sbatch --signal=USR1@120."""
# Launchers repeat a signal, or send another on top: what comes so soon is still the first request.
ONE_REQUEST_SECONDS = 2.0
_SECONDS_BETWEEN_QUESTIONS = 1.0
_MOST_STEPS_BETWEEN_QUESTIONS = 10


class StopRequest:
    """Listens while it is entered; `agreed` makes one answer of what all ranks have heard.

    Outside of `with`, signals do what they always do. Ignored ones (`nohup`) stay ignored.
    """

    def __init__(self) -> None:
        self.signal = 0
        """What the ranks have agreed to stop for; 0: nothing."""
        self.all_ready = False
        """The ranks talked in the last call of `agreed`, and all of them were `ready`."""
        self.seconds: float | None = None
        """The most that a rank gave as `seconds` in the last call of `agreed`, if they talked."""
        self._asked, self._asked_at = 0, 0.0
        self._steps, self._steps_to_question = 0, 1
        self._last_question = time.monotonic()
        # A group of its own, on the CPU: the question waits for no device.
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    @property
    def status(self) -> int:
        """What the process should end with: 0, or 128 and the signal's number, as shells do."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> "StopRequest":
        """Begin to listen. In a thread, for a second signal must end even a stuck process."""
        self._old_handlers: dict[int, Any] = {
            number: signal.signal(number, lambda *_: None)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)

    def agreed(self, *, now: bool = False, ready: bool = False, seconds: float = 0.0) -> bool:
        """True if any rank was asked to stop. Every rank must call it, after every step.

        The ranks talk only about once a second, so that it costs next to nothing.

        Args:
            now: do not wait for the second to pass: something long has ended, or comes next.
            ready: for what all ranks have to do together; see `all_ready`.
            seconds: of the training so far; see `seconds`.
        """
        self.all_ready, self.seconds = False, None
        if not now:
            self._steps += 1
            if self._steps < self._steps_to_question:
                return False
        pace = (time.monotonic() - self._last_question) / max(1, self._steps)
        facts = torch.tensor([self._asked, pace, not ready, seconds], dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(facts, dist.ReduceOp.MAX, group=self._group)
        self.signal, pace, self.all_ready = int(facts[0]), float(facts[1]), not facts[2]
        self.seconds = float(facts[3])
        if not now:  # the slowest rank's count, so that all ask after the same step
            steps = int(_SECONDS_BETWEEN_QUESTIONS / max(pace, 1e-6))
            self._steps_to_question = min(max(1, steps), _MOST_STEPS_BETWEEN_QUESTIONS)
        self._steps, self._last_question = 0, time.monotonic()
        return self.signal != 0

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._pipe[0]], [], [], 1.0)
            for number in os.read(self._pipe[0], 64) if ready else b"":
                if number == 0:
                    return
                if number in self._old_handlers:
                    self._ask(number, signal.Signals(number).name)
            if not self._asked and any(_parent(child) != parent for child, parent in _LINKS):
                self._ask(signal.SIGTERM, "the launcher is gone")

    def _ask(self, number: int, reason: str) -> None:
        if not self._asked:
            self._asked, self._asked_at = number, time.monotonic()
            logger.info("%s: saving after this step, then ending; once more: at once", reason)
        elif time.monotonic() - self._asked_at > ONE_REQUEST_SECONDS:
            os._exit(128 + number)


def _links_to_launcher() -> list[tuple[int, int]]:
    """Pairs of a process and its parent that last as long as the launcher that started this one.

    `deepspeed` starts deepspeed.launcher.launch, which starts the ranks; it passes no signal on.
    A parent that is no launcher, a shell for instance, may go: `nohup` is for that.
    """
    parent = os.getppid()
    command = _command(parent)
    if b"deepspeed.launcher.launch" in command:
        return [(os.getpid(), parent), (parent, _parent(parent))]
    if b"torchrun" in command or b"torch.distributed" in command:
        return [(os.getpid(), parent)]
    if parent == 1 and has_launcher():
        return [(os.getpid(), 0)]  # gone already
    return []


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(process: int) -> int:
    """Number of a process's parent; 0 where there is no telling, or no such process."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# Found when this process starts: a launcher that is killed before the training begins counts, too.
_LINKS = _links_to_launcher()
