"""A checkpoint is whole or absent, and damage to it is found; in one process, small engines."""

import errno
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from ds_deberta import checkpoint
from ds_deberta.checkpoint import SaveError, TrainState, read_description
from tests.test_checkpoint import checkpointer, folders, log, resumed, save  # noqa: F401 - a fixture


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)  # the last one may be a line's end


def swap(file: Path) -> None:
    other = file.parent.parent / "discriminator" / file.name
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


FILES = [
    "checkpoint.json",
    "spm.model",
    *(f"generator/{k}-00000.safetensors" for k in ("weights", "exp_avg")),
]


HARMS = [
    *((harm, name) for harm in (flip, truncate, Path.unlink) for name in FILES),
    *((swap, name) for name in FILES if "/" in name),
]


@pytest.mark.parametrize(("harm", "name"), HARMS)
def test_a_damaged_checkpoint_is_passed_over_and_its_file_named(tmp_path, log, harm, name):  # noqa: F811
    for step in (10, 20):
        path = save(checkpointer(tmp_path), step)
    harm(path / name)
    assert resumed(checkpointer(tmp_path)) == TrainState(10, 80)
    assert f"{path} is passed over" in log.text
    assert Path(name).name in log.text
    assert (harm is truncate and name != "checkpoint.json") == (" bytes, and had " in log.text)
    save(checkpointer(tmp_path), 20)
    assert resumed(checkpointer(tmp_path)).step == 20


def test_every_byte_of_the_description_counts(tmp_path):
    path = save(checkpointer(tmp_path), 10)
    file = path / "checkpoint.json"
    content = file.read_bytes()
    description = read_description(path)
    for place in range(0, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert read_description(path) == description  # a blank that became a tab, or such
        except checkpoint.DamageError:
            continue


def test_none_whole_is_an_error_and_never_a_new_start(tmp_path):
    for step in (10, 20):
        flip(save(checkpointer(tmp_path), step) / "spm.model")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*20/spm\.model .*10/spm"):
        resumed(checkpointer(tmp_path))


def test_what_died_while_saving_is_swept_and_nothing_else(tmp_path, log):  # noqa: F811
    save(checkpointer(tmp_path), 10)
    place = tmp_path / "run/checkpoints"
    for name in ("step_0000020.tmp", "step_0000010.old.tmp", "step_mine.tmp", "notes"):
        (place / name / "generator").mkdir(parents=True)
    assert resumed(checkpointer(tmp_path)).step == 10
    assert folders(tmp_path) == ["notes", "step_0000010", "step_mine.tmp"]
    assert "removed" in log.text


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_failing_write_leaves_everything_as_it_was(tmp_path, monkeypatch, call, in_background):
    """Whichever it is: the n-th call fails, for every n until the save gets through."""
    save(checkpointer(tmp_path), 10)
    real = getattr(os, call)
    for n in range(100):
        calls = iter(range(1000))

        def failing(*args, calls=calls, n=n, **kwargs):
            if next(calls) == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save(checkpointer(tmp_path), 20, in_background=in_background)
                break
            except SaveError as error:
                assert "step_0000020 could not be written: " in str(error)
                assert "No space left on device (rank 0)" in str(error)
        found = folders(tmp_path)
        if found == ["step_0000010", "step_0000020"]:
            break  # the rename had been made; only its way to the disk is unknown
        assert found == ["step_0000010"]
        assert resumed(checkpointer(tmp_path)).step == 10
    assert n > 0
    assert resumed(checkpointer(tmp_path)).step == 20


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A process saves all the time, in turn in the background, and says so; killed 20 times."""
    rng = random.Random(3)
    step = 1
    save(checkpointer(tmp_path), step)
    for _ in range(20):
        said, says = os.pipe()
        if (child := os.fork()) == 0:
            logging.disable()
            saver = checkpointer(tmp_path, keep=2)
            for number in range(step + 1, 10**6):
                save(saver, number, in_background=number % 2 == 0)
                os.write(says, number.to_bytes(4, "little"))
        os.close(says)
        with os.fdopen(said, "rb") as stream:
            heard = stream.read(4 * rng.randint(0, 2))
            time.sleep(0.04 * rng.random())  # about one more save
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            heard += stream.read()
        last = int.from_bytes(heard[-4:], "little") if heard else step
        step = resumed(checkpointer(tmp_path)).step
        assert step in (last, last + 1)
        assert not [name for name in folders(tmp_path) if name.endswith(".tmp")]
    assert step > 10


def test_too_little_space_is_told_before_and_nothing_is_written(tmp_path, monkeypatch, log):  # noqa: F811
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    resumed(checkpointer(tmp_path))
    assert "make room before the first" in log.text
    with pytest.raises(SaveError, match=r"takes 0\.00 GiB, and 0\.00 GiB are free"):
        save(checkpointer(tmp_path), 10)
    assert folders(tmp_path) == []
