"""prepare_data.py, killed, without room or without its input: the whole result, or an error."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import sentences
from tests.faults.test_metrics_go_on import fill, small_disk  # noqa: F401 - a fixture
from tests.launch import ROOT, clean_environment

TOOL = ROOT / "data_tools/prepare_data.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of work, in two files."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = sentences(2000)
    for name in ("a", "b"):
        with (folder / f"{name}.jsonl").open("w") as out:
            out.writelines(json.dumps({"text": line}) + "\n" for line in lines * 15)
    return folder


def command(corpus: Path, vocab_file: Path, output: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(TOOL), "-i", str(corpus), "-o", str(output)),
        *("--vocab", str(vocab_file), "--max_seq_length", "32", "--rows_per_shard", "1500"),
        *("--workers", "2", *more),
    ]


def prepare(*words: str, status: int = 0, **options: object) -> str:
    done = subprocess.run(
        words, env=clean_environment(), capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def shards_are_whole(folder: Path, whole: dict[str, bytes]) -> bool:
    """What has a shard's name is that shard, to the byte."""
    found = files(folder)
    return all(found[name] == whole[name] for name in found if name.endswith(".arrow"))


@pytest.fixture(scope="module")
def unbroken(corpus, vocab_file, tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """The result, and the seconds it took."""
    output = tmp_path_factory.mktemp("unbroken") / "data"
    started = time.monotonic()
    prepare(*command(corpus, vocab_file, output))
    return files(output), time.monotonic() - started


@pytest.mark.parametrize("kills", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_result_is_that_of_an_unbroken_run(
    corpus, vocab_file, tmp_path, unbroken, kills
):
    whole, seconds = unbroken
    rng = random.Random(kills)
    left = 0
    for number in range(kills):
        output = tmp_path / f"data{number % 3}"  # several kills to each folder
        process = subprocess.Popen(
            command(corpus, vocab_file, output),
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            assert shards_are_whole(output, whole)
            left += any(name.endswith(".tmp") for name in files(output))
    for output in sorted(tmp_path.iterdir()):
        (output / "train").mkdir(parents=True, exist_ok=True)
        (output / "train/00099.arrow.tmp").write_bytes(b"half a shard")
        if (output / "preparation.json").exists():
            prepare(*command(corpus, vocab_file, output))
            assert files(output) == whole
    print(f"{kills} kills within {seconds:.1f} s, {left} left a .tmp file: same bytes in the end")


@pytest.mark.slow
def test_files_have_the_users_umask(corpus, vocab_file, tmp_path):
    words = command(corpus / "a.jsonl", vocab_file, tmp_path / "data", "--workers", "0")
    prepare(*words, preexec_fn=lambda: os.umask(0o027))
    for path in (tmp_path / "data", *(tmp_path / "data").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def limit_file_size() -> None:
    """More than the vocabulary needs, less than a shard."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_an_error_and_no_shard(corpus, vocab_file, tmp_path):
    words = command(corpus, vocab_file, tmp_path / "data", "--rows_per_shard", "5000")
    error = prepare(*words, status=2, preexec_fn=limit_file_size)
    assert "File too large, while writing" in error
    assert "00000.arrow" in error
    assert not [name for name in files(tmp_path / "data") if name.endswith((".arrow", ".tmp"))]
    prepare(*words)
    prepare(*words[:5], str(tmp_path / "whole"), *words[6:])
    assert files(tmp_path / "data") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_the_same_command_goes_on(
    corpus,
    vocab_file,
    small_disk,  # noqa: F811
    unbroken,
):
    subprocess.run(["mount", "-o", "remount,size=800k", str(small_disk)], check=True)
    words = command(corpus, vocab_file, small_disk / "data")
    error = prepare(*words, status=2)
    assert "No space left on device, while writing" in error
    found = files(small_disk / "data")
    assert any(name.endswith(".arrow") for name in found)
    assert not any(name.endswith(".tmp") for name in found)
    assert shards_are_whole(small_disk / "data", unbroken[0])
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    prepare(*words)
    assert files(small_disk / "data") == unbroken[0]


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_an_error(corpus, vocab_file, small_disk):  # noqa: F811
    fill(small_disk)
    error = prepare(*command(corpus, vocab_file, small_disk / "data"), status=2)
    assert "No space left on device" in error


@pytest.mark.slow
@pytest.mark.parametrize("what", ["input", "output"])
def test_a_folder_that_vanishes_is_an_error(corpus, vocab_file, tmp_path, what):
    """While it is read, or written to."""
    copy = tmp_path / "corpus"
    copy.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (copy / name).write_bytes((corpus / name).read_bytes())
    output = tmp_path / "data"
    ahead = ("--workers", "0") if what == "input" else ()  # else it is read before a shard is there
    process = subprocess.Popen(
        command(copy, vocab_file, output, *ahead),
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (output / "train/00000.arrow").exists():
        assert process.poll() is None
        time.sleep(0.005)
    gone = copy if what == "input" else output
    gone.rename(tmp_path / "elsewhere")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    assert "Traceback" not in error
    assert "No such file or directory" in error
    assert str(gone) in error
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize("what", ["no right to read it", "a folder of that name", "a device"])
def test_input_that_can_not_be_read_is_an_error(vocab_file, tmp_path, what):
    file = tmp_path / "a.jsonl"
    if what == "no right to read it":
        if os.geteuid() == 0:
            pytest.skip("rights do not bind root")
        file.write_text('{"text": "the king"}\n')
        file.chmod(0)
    elif what == "a folder of that name":
        file.mkdir()
    else:
        file.symlink_to("/proc/self/mem")  # a read error
    error = prepare(*command(file, vocab_file, tmp_path / "data"), status=2)
    assert "a.jsonl" in error
