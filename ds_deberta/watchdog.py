"""A process that makes no progress says where it is stuck, and ends.

One rank that is stopped or waits for its data for ever would hold all others in their next
collective. Each rank watches itself: the others end after the same time, and their launcher
ends the one that can not.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from ds_deberta.distributed import logger, rank

# The ranks' clocks began between their last steps: let all leave their stacks before one is gone.
_SECONDS_FOR_OTHERS = 2.0
# If python itself is stuck (in a page of a mapped file, say), faulthandler's own thread does it.
_SECONDS_FOR_PYTHON = 5.0

Item = TypeVar("Item")


class Watchdog:
    """Watches this process while it is entered.

    Args:
        folder: gets a file with the stacks of all threads if this process is stuck.
        timeout: seconds without `progress` that mean it is; 0: never.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self._folder = folder
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._is_over = threading.Event()

    def __enter__(self) -> "Watchdog":
        """Begin to watch."""
        self.progress()
        if self._timeout:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """Say that this process is well."""
        if self._timeout:
            self._deadline = time.monotonic() + self._timeout
            faulthandler.dump_traceback_later(self._timeout + _SECONDS_FOR_PYTHON, exit=True)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on; each of them is progress."""
        for item in items:
            self.progress()
            yield item
        self.progress()

    def _watch(self) -> None:
        while not self._is_over.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                self._leave()

    def _leave(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}_rank_{rank():05d}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file)
        logger.error(
            "rank %d has made no progress for %g s (--hang_timeout); its stacks are in %s. A rank "
            "without such a file was stopped. All ends; the same command goes on from the last "
            "checkpoint.",
            rank(),
            self._timeout,
            path,
        )
        self._is_over.wait(_SECONDS_FOR_OTHERS)
        os._exit(1)
