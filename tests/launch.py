"""Start a script on several ranks of this machine, as a launcher would."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ds_deberta.ports import free_port

ROOT = Path(__file__).parent.parent


def run_ranks(
    script: Path, *args: str, world_size: int = 1, timeout: float = 900, status: int = 0
) -> str:
    """Run `script` once per rank; returns what they printed.

    Raises:
        AssertionError: a rank ended with another status, or they took longer than `timeout`
            seconds; with the output.
    """
    port = free_port()
    with tempfile.TemporaryFile("w+") as output:  # a pipe would fill up and stop its rank
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *args],
                env=clean_environment()
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",  # sums of two threads differ in the last bit
                },
                cwd=ROOT,
                stdout=output,
                stderr=output,
            )
            for rank in range(world_size)
        ]
        try:
            statuses = _wait(processes, time.monotonic() + timeout, {None, status})
        finally:
            for process in processes:
                process.kill()  # nothing, for one that has ended
                process.wait()
        output.seek(0)
        printed = output.read()
        assert statuses == [status] * world_size, f"{statuses}: {printed[-4000:]}"
        return printed


def processes_with(word: str, **environment: str) -> list[int]:
    """Numbers of the live processes with `word` in their command line, and these variables."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() not in (folder / "cmdline").read_bytes():
                continue  # that of a zombie is empty
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if all(f"{name}={value}".encode() in variables for name, value in environment.items()):
            found.append(int(folder.name))
    return found


def left_in_shared_memory(before: set[str]) -> set[str]:
    """New files of /dev/shm that no live process holds; other tests may run beside this one."""
    for _ in range(50):
        left = {name for name in os.listdir("/dev/shm") if name not in before}
        if left:
            held = _held()
            left = {name for name in left if f"/dev/shm/{name}\n" not in held}
        if not left:
            break
        time.sleep(0.1)
    return left


def _held() -> str:
    """The files that processes map or have open."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((folder / "maps").read_text())
            lines.extend(os.readlink(file) for file in (folder / "fd").iterdir())
    return "\n".join([*lines, ""])


def clean_environment() -> dict[str, str]:
    """This environment without a launcher's variables, with the checkout importable."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return kept | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def _wait(
    processes: list[subprocess.Popen], deadline: float, expected: set[int | None]
) -> list[int | None]:
    """Wait until all have ended, one otherwise than expected, or time is up; return statuses."""
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in processes]
        if None not in statuses or set(statuses) - expected:
            break
        time.sleep(0.1)
    return [process.poll() for process in processes]
