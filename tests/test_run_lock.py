"""One run at a time in a folder, and no dead one in the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_deberta import run_lock
from ds_deberta.run_lock import LOCK_FILE, check_no_run_in, only_run_in
from tests.launch import ROOT, clean_environment

# Holds a folder until it is killed; a child that it forked, as a data worker, lives on.
HOLDER = """
import os, sys, time
from pathlib import Path
from ds_deberta import run_lock
run_lock._BEAT = 0.2
with run_lock.only_run_in(Path(sys.argv[1])):
    if child := os.fork():
        print(child, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    yield process
    os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()


def name_another_host(folder: Path) -> None:
    """Make the lock's owner a process of another host."""
    file = folder / LOCK_FILE
    owner = json.loads(file.read_text()) | {"host": "node7", "identity": "another"}
    file.write_text(json.dumps(owner))


def test_a_second_run_is_refused_and_a_killed_one_is_in_nobodys_way(tmp_path, holder, monkeypatch):
    for look in (only_run_in(tmp_path).__enter__, lambda: check_no_run_in(tmp_path)):
        with pytest.raises(ValueError, match=rf"trains in {tmp_path}: process {holder.pid} on "):
            look()
    holder.send_signal(signal.SIGSTOP)  # the kernel knows that it is alive
    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "_PATIENCE", 0.5)
        with pytest.raises(ValueError, match=rf"process {holder.pid} on "):
            only_run_in(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    started = time.monotonic()
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    assert time.monotonic() - started < run_lock._PATIENCE / 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_host_is_alive_as_long_as_it_shows_it(tmp_path, monkeypatch):
    """Where the file system has no locks between hosts, or none at all."""
    monkeypatch.setattr(run_lock, "_DEAD", 1.0)
    with only_run_in(tmp_path):
        (tmp_path / "checkpoints").mkdir()
        name_another_host(tmp_path)
        left = (tmp_path / LOCK_FILE).read_text()
    assert (tmp_path / LOCK_FILE).read_text() == left  # another one's is not removed

    def touch(*_, file=tmp_path / LOCK_FILE, sleep=time.sleep) -> None:
        os.utime(file)
        sleep(0.05)

    for locks in (True, None):
        with monkeypatch.context() as patch:
            patch.setattr(run_lock, "_lock", lambda *_, locks=locks: locks)
            patch.setattr(time, "sleep", touch)
            with pytest.raises(ValueError, match="on node7, since"), only_run_in(tmp_path):
                pass
            with pytest.raises(ValueError, match="on node7, since"):
                check_no_run_in(tmp_path)


@pytest.mark.parametrize("locks", [True, False, None])
def test_a_dead_host_is_waited_for_and_taken_over(tmp_path, monkeypatch, locks):
    """Also where its lock has stayed on the server."""
    monkeypatch.setattr(run_lock, "_DEAD", 0.5)
    with only_run_in(tmp_path):
        name_another_host(tmp_path)
    monkeypatch.setattr(run_lock, "_lock", lambda *_: locks)
    check_no_run_in(tmp_path)
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_run_whose_folder_was_taken_over_ends(tmp_path, holder):
    name_another_host(tmp_path)
    assert holder.wait(30) == 1


def test_a_refused_start_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="bad"), only_run_in(tmp_path / "runs/new"):
        raise ValueError("bad settings")
    assert not (tmp_path / "runs/new").exists()
