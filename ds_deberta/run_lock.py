"""One run at a time in an --output_dir: two would delete each other's checkpoints.

The file `.lock` in the folder names the process that trains there, and is gone after its end. A
POSIX lock holds it: the kernel releases it when that process dies, however it dies, children do
not inherit it, and NFS passes it on to other hosts. Not everywhere: some mounts keep locks to
themselves, and those of a crashed host may stay. So the run also touches the file every 10 s. A
run on another host that has not done so for 60 s is dead: its folder is taken over. Should it be
alive all the same (its network was down, say), it finds the other's name in the file, and ends.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ds_deberta.distributed import host_identity, logger

LOCK_FILE = ".lock"
_BEAT = 10.0  # seconds between two signs of life
_DEAD = 60.0  # seconds without one, of a run whose lock this host may not see
_PATIENCE = 30.0  # seconds for a killed process to give its memory back, and its lock after that
_LOOK = 0.1  # seconds between two looks


@dataclass(frozen=True)
class Owner:
    """The process that trains in a folder."""

    process: int
    host: str
    identity: str
    """Of the host, until it is booted again."""
    started: str


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Have the folder to this process alone; make it where it is not there.

    Raises:
        ValueError: another run has it; names its host and process.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    handle = _take(file)
    host = host_identity()
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = Owner(os.getpid(), socket.gethostname(), host, started)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(owner)).encode(), 0)
    is_over = threading.Event()
    beat = threading.Thread(target=_beat, args=(handle, owner, folder, is_over), daemon=True)
    beat.start()
    try:
        yield
    finally:
        is_over.set()
        beat.join()
        with contextlib.suppress(OSError):
            if _read(handle) == owner:
                file.unlink()
            if is_new:
                folder.rmdir()  # where nothing was written, nothing is left
        os.close(handle)


def check_no_run_in(folder: Path) -> None:
    """Refuse a folder that a run trains in, without taking it.

    Raises:
        ValueError: as `only_run_in`.
    """
    with contextlib.suppress(FileNotFoundError):  # it has just ended
        if (folder / LOCK_FILE).exists():
            os.close(_take(folder / LOCK_FILE, look_only=True))


def _take(file: Path, *, look_only: bool = False) -> int:
    """Open the file and lock it, as far as there are locks.

    No other handle of it may be closed in this process afterwards: that would release the lock.
    """
    named, touched = _look(file)
    is_watched = named is not None and named.identity != host_identity()
    if is_watched:
        _watch(file)
    deadline = time.monotonic() + _PATIENCE
    while True:
        handle = os.open(file, os.O_RDONLY if look_only else os.O_RDWR | os.O_CREAT, 0o666)
        # Those who only look do not hinder each other.
        is_locked = _lock(handle, fcntl.LOCK_SH if look_only else fcntl.LOCK_EX)
        owner = _read(handle)
        if is_locked and (look_only or _is_at(file, handle)):
            return handle
        if not is_locked and is_watched and owner == named:
            return handle  # of a dead run: its lock has stayed, or there are no locks
        is_alive = owner == named is not None and os.fstat(handle).st_mtime_ns != touched
        os.close(handle)
        if is_locked is None and not is_watched:
            _watch(file)
            named, is_watched = owner, True
        elif is_alive or time.monotonic() > deadline:
            raise _refusal(file, owner)
        else:
            time.sleep(_LOOK)


def _watch(file: Path) -> None:
    """Wait whether the run that the file names is alive.

    Raises:
        ValueError: it is.
    """
    owner, seen = _look(file)
    if owner is None:
        return
    logger.info(
        "%s names process %d on %s: waiting %g s for a sign of its life",
        *(file, owner.process, owner.host, _DEAD),
    )
    deadline = time.monotonic() + _DEAD
    while time.monotonic() < deadline:
        time.sleep(_LOOK)
        now, touched = _look(file)
        if now is None:
            return  # it has just ended
        if (now, touched) != (owner, seen):
            raise _refusal(file, now)
    logger.warning("there was none: %s is taken over", file.parent)


def _refusal(file: Path, owner: Owner | None) -> ValueError:
    if owner is None:
        return ValueError(f"another run starts in {file.parent}; choose another --output_dir")
    return ValueError(
        f"another run trains in {file.parent}: process {owner.process} on {owner.host}, since "
        f"{owner.started}. Wait for its end, stop it (kill {owner.process} there), or choose "
        "another --output_dir."
    )


def _look(file: Path) -> tuple[Owner | None, int]:
    """Read a lock and when it was touched last; opened for that, so that NFS asks its server."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return None, 0
    try:
        return _read(handle), os.fstat(handle).st_mtime_ns
    finally:
        os.close(handle)


def _read(handle: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(handle, 4096, 0)))
    except (ValueError, TypeError):
        return None  # empty, or half written


def _lock(handle: int, kind: int) -> bool | None:
    """Lock a file; False where another process has it, None where the file system has no locks."""
    try:
        fcntl.lockf(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _is_at(file: Path, handle: int) -> bool:
    """Whether the open file is still there under its name: its last owner may have removed it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except OSError:
        return False


def _beat(handle: int, owner: Owner, folder: Path, is_over: threading.Event) -> None:
    """Show signs of life; end this process if another run has the folder."""
    while not is_over.wait(_BEAT):
        try:
            os.utime(handle)
            now = _read(handle)
        except OSError:
            continue
        if now is not None and now != owner:
            logger.error(
                "process %d on %s has taken over %s, because this run showed no sign of life for "
                "%g s; this one ends, without saving",
                *(now.process, now.host, folder, _DEAD),
            )
            os._exit(1)
