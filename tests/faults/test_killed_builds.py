"""A killed build of an extension of torch holds up no later one, and nobody waits without end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from ds_deberta import builds
from ds_deberta.builds import Baton
from tests.launch import ROOT, clean_environment

WORKER = ROOT / "tests/workers/build_extension.py"
SLOW_COMPILER = """#!/bin/sh
case "$*" in
    *" -c "*) echo begins >> {log}; sleep 2; g++ "$@"; echo ends >> {log};;
    *) exec g++ "$@";;
esac
"""
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="apt-get install g++")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "answer").mkdir()
    return tmp_path / "answer"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What the compiler, which takes its time, has begun and ended."""
    compiler = tmp_path / "slow-g++"
    compiler.write_text(SLOW_COMPILER.format(log=tmp_path / "log"))
    compiler.chmod(0o755)
    (tmp_path / "log").touch()
    return tmp_path / "log"


def build(folder: Path, log: Path) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where ninja is
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(folder)],
        env=clean_environment() | {"CXX": str(log.parent / "slow-g++"), "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


@needs_a_compiler
def test_a_build_follows_a_killed_one_at_once(folder, log):
    """It waits for the compiler that the killed one left, and for nothing else."""
    killed = build(folder, log)
    end = time.monotonic() + 60
    while not log.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (folder / "lock").exists()
    assert log.read_text() == "begins\n"

    assert answer(build(folder, log)) == "42\n"
    assert log.read_text().startswith("begins\nends\n")
    assert not (folder / "lock").exists()


@needs_a_compiler
def test_of_two_one_builds(folder, log):
    processes = [build(folder, log) for _ in range(2)]
    assert [answer(process) for process in processes] == ["42\n", "42\n"]
    assert log.read_text() == "begins\nends\n"
    assert not (folder / "lock").exists()


def test_a_build_that_does_not_end_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(builds, "PATIENCE", 0.3)
    first, second = (Baton(str(folder / "lock")) for _ in range(2))
    assert first.try_acquire()
    with pytest.raises(ValueError, match=f"a build in {folder} must end"):
        second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()
    assert os.listdir(folder) == []


def test_another_program_s_lock_stays_until_it_goes(folder, monkeypatch):
    monkeypatch.setattr(builds, "PATIENCE", 0.3)
    other, ours = FileBaton(str(folder / "lock")), Baton(str(folder / "lock"))
    assert other.try_acquire()
    with pytest.raises(ValueError, match=f"remove {folder / 'lock'}"):
        ours.try_acquire()
    other.release()
    assert ours.try_acquire()
    assert not other.try_acquire()
    ours.release()
    assert other.try_acquire()
    other.release()
