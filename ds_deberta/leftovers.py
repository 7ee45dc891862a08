"""A folder of this process for what is needed on the way; the next start sweeps a killed one's."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A socket's path has at most 107 bytes.
_LONGEST = 107 - len("12345678/pymp-12345678/listener-12345678")


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Have `tempfile`, and so the sockets of data workers, use a folder that goes at the end.

    Who is killed leaves it behind, with a lock that the kernel has opened: that tells which ones
    the next start may delete, whatever the process numbers in other containers.
    """
    prefix = f"ds_deberta_{os.getuid()}_"
    shared = Path(tempfile.gettempdir())
    if len(os.fsencode(shared / prefix)) > _LONGEST:
        shared = Path("/tmp")
    for folder in shared.glob(f"{prefix}*"):
        _delete_if_left(folder)
    own, handle = _make_locked(
        shared, prefix
    )  # data workers share the lock, until the last one is gone
    before, tempfile.tempdir = tempfile.tempdir, str(own)
    try:
        yield own
    finally:
        tempfile.tempdir = before
        os.close(handle)
        shutil.rmtree(own, ignore_errors=True)


def _make_locked(shared: Path, prefix: str) -> tuple[Path, int]:
    while True:
        own = Path(tempfile.mkdtemp(prefix=prefix, dir=shared))
        try:
            handle = os.open(own, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another start took it for a left one
        with suppress(OSError):  # a file system without locks: then none is ever swept
            fcntl.flock(handle, fcntl.LOCK_EX)
        if own.exists():
            return own, handle
        os.close(handle)


def _delete_if_left(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # gone, or somebody else's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its owner lives
    finally:
        os.close(handle)
