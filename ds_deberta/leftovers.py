"""Folders of this process for what is needed on the way; the next start sweeps a killed one's."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# A socket's path has at most 107 bytes.
_LONGEST = 107 - len("12345678/pymp-12345678/listener-12345678")
_PREFIX = f"ds_deberta_{os.getuid()}_"
_more = ExitStack()  # folders that go with the temporary one


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Have `tempfile`, and so the sockets of data workers, use a folder that goes at the end."""
    shared = Path(tempfile.gettempdir())
    if len(os.fsencode(shared / _PREFIX)) > _LONGEST:
        shared = Path("/tmp")
    with _own_folder(shared) as own:
        before, tempfile.tempdir = tempfile.tempdir, str(own)
        try:
            yield own
        finally:
            tempfile.tempdir = before
            _more.close()


def own_folder(shared: Path) -> Path:
    """Make a folder in `shared` that goes with the temporary one, or is swept as it is."""
    return _more.enter_context(_own_folder(shared))


@contextmanager
def _own_folder(shared: Path) -> Iterator[Path]:
    """Sweep those of dead processes; make one, and delete it at the end.

    Who is killed leaves it behind, with a lock that the kernel has opened: that tells which ones
    the next start may delete, whatever the process numbers in other containers.
    """
    for folder in shared.glob(f"{_PREFIX}*"):
        _delete_if_left(folder)
    own, handle = _make_locked(shared)  # data workers share the lock, until the last one is gone
    try:
        yield own
    finally:
        os.close(handle)
        shutil.rmtree(own, ignore_errors=True)


def _make_locked(shared: Path) -> tuple[Path, int]:
    while True:
        own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=shared))
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
