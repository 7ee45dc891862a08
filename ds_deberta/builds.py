"""Builds of torch extensions, such as DeepSpeed's async_io: a killed one holds up no later one.

torch marks a build by a file `lock` in its folder, and waits without end for that of a killed
process. Here the kernel holds a lock of the folder besides, which it opens when a process dies;
and ours is a link, not a file, which tells the next one that it may remove it then.
"""

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch.utils import cpp_extension

from ds_deberta.distributed import logger

PATIENCE = 1800.0
"""Seconds to wait for others in a folder. A build takes minutes; on a busy machine ten."""


def use_batons() -> None:
    """Have all builds of this process hold a `Baton`."""
    cpp_extension.FileBaton = Baton  # type: ignore[assignment,misc]


class Baton:
    """What a process holds while it builds, in the place of torch's `FileBaton`.

    Everyone who wants it gets it, one after the other. Who comes later finds the work done.
    """

    def __init__(self, lock_file_path: str) -> None:
        self._lock = Path(lock_file_path)
        self._folder = self._lock.parent
        self._handle = -1
        self._is_alone = True

    def try_acquire(self) -> bool:
        """Wait for the baton, and hold it.

        Raises:
            ValueError: somebody else's build in the folder does not end.
        """
        if not any(self._folder.glob("*.so")):
            name = self._folder.name
            logger.info("building %s in %s, once; it may take minutes", name, self._folder)
        self._handle = os.open(self._folder, os.O_RDONLY)
        self._wait_until(self._has_asked_the_kernel)
        if self._is_alone and self._lock.is_symlink():
            logger.info("%s is of a killed build, and goes", self._lock)
            self._wait_until(self._is_quiet)
            self._lock.unlink()
        self._wait_until(self._has_made_the_lock)
        return True

    def release(self) -> None:
        """Let the next one have it."""
        self._lock.unlink()
        os.close(self._handle)

    def _has_asked_the_kernel(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: then nobody's is removed
            self._is_alone = False
        return True

    def _is_quiet(self) -> bool:
        """Whether no process works in the folder: a killed build's compilers end by themselves."""
        for place in Path("/proc").glob("[0-9]*/cwd"):
            with suppress(OSError):  # it has just ended, or is another user's
                if place.samefile(self._folder):
                    return False
        return True

    def _has_made_the_lock(self) -> bool:
        with suppress(FileExistsError):
            self._lock.symlink_to(".")  # made and marked at once; others see that it exists
            return True
        return False

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        if condition():
            return
        logger.info("waiting for a build in %s, %g s at most", self._folder, PATIENCE)
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                os.close(self._handle)
                raise ValueError(
                    f"a build in {self._folder} must end; one has been there for {PATIENCE:g} s. "
                    f"End who makes it, or, if nobody does, remove {self._lock}."
                )
            time.sleep(0.1)
