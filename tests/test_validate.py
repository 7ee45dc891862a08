"""--validate names everything that is wrong, all at once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_deberta.config import parse
from ds_deberta.distributed import find_place, plan_world_size
from ds_deberta.validate import (
    check_build_locks,
    check_disk,
    check_leftovers,
    check_shm,
    validate,
)
from tests.conftest import write_data
from tests.launch import ROOT, clean_environment

ONE = find_place({})
LENGTH = ("--max_seq_length", "32")


@pytest.fixture(autouse=True)
def _one_process_again():
    yield
    plan_world_size(1)


def flags(data_dir: Path, model: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *("--objective", "rtd", "--model", str(model), "--data_dir", str(data_dir)),
        *("--output_dir", str(output_dir), *LENGTH, "--train_batch_size", "8"),
        *more,
    ]


@pytest.fixture
def command(data_dir, tiny_model_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return lambda *more, data=data_dir: flags(data, tiny_model_file, tmp_path / "run", *more)


def wrong(*argv: str) -> list[str]:
    return [line for is_right, line in validate(parse(argv), ONE) if not is_right]


def test_a_run_that_would_start_is_right_and_nothing_is_written(command, tmp_path):
    assert wrong(*command("--expect_world_size", "4")) == []
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_named_in_one_go(command, data_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    shard = data / "train" / "00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (tmp_path / "run").write_text("a file")
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    lines = wrong(*command("--deepspeed_config", "ds_configs/zero9.json", data=data))
    found = "\n".join(lines)
    assert "no DeepSpeed configuration at ds_configs/zero9.json" in found
    assert f"{shard} is not what was written" in found
    assert "run can not be written" in found
    assert f"rm {lock}" in found
    assert "disk space: not checked, because it needs DeepSpeed" in found


def test_each_part_of_the_data_is_checked(command, data_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    with (data / "spm.model").open("ab") as file:
        file.write(b"x")
    assert any(line.startswith("WRONG  vocabulary") for line in wrong(*command(data=data)))
    short = wrong(*command("--max_seq_length", "16"))
    assert any("max_seq_length must be at least" in line for line in short)


def test_data_without_held_out_rows_are_right(command, vocab_file, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_data(data, vocab_file, valid_rows=0)
    lines = [line for _, line in validate(parse(command(data=data)), ONE)]
    (said,) = (line for line in lines if "held-out rows" in line)
    assert said.startswith("ok     held-out rows: none, because")
    assert not [line for line in lines if line.startswith("WRONG")]


def test_rows_are_as_long_as_the_data_s_and_padding_is_said(command, short_data_dir):
    def lines(*more: str) -> str:
        argv = [word for word in command(data=short_data_dir) if word not in LENGTH]
        return "\n".join(line for _, line in validate(parse([*argv, *more]), ONE))

    assert "ok     length of rows: 24 tokens" in lines()
    padded = lines("--max_seq_length", "48")
    assert "\nNOTE   rows of 24 are padded to 48: 2 times the work" in padded


def test_a_warm_up_that_never_ends_is_named_beside_all_else(command):
    found = wrong(*command("--num_training_steps", "60", "--warmup", "10000"))
    assert len(found) == 1
    assert found[0].startswith("WRONG  schedule: --warmup must be shorter than the run, 60 steps")


def test_without_data_the_rest_is_checked(command, tmp_path):
    (tmp_path / "run").write_text("a file")
    argv = [word for word in command(data=tmp_path / "none") if word not in LENGTH]
    found = "\n".join(wrong(*argv))
    assert "WRONG  data: " in found
    assert "none must be a folder of prepared data" in found
    assert "run can not be written" in found
    assert "vocabulary: not checked, because it needs data" in found


def test_a_batch_is_checked_for_the_planned_processes(command):
    assert any(
        "train_batch_size must be a multiple of the 3 processes" in line
        for line in wrong(*command("--expect_world_size", "3"))
    )


def test_space_is_checked(command, tmp_path):
    assert "GiB free" in check_disk(tmp_path / "new", needed=1)
    with pytest.raises(ValueError, match="GiB are free"):
        check_disk(tmp_path / "new", needed=2**60)
    with pytest.raises(ValueError, match="0 MiB free"):
        check_shm(parse(command()), 1, shm=tmp_path / "none")


def test_shared_memory_of_dead_processes_is_named(tmp_path):
    check_leftovers(tmp_path)
    (tmp_path / "deepspeed_allreduce_buffer_0").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"rm .*deepspeed_allreduce_buffer_0"):
        check_leftovers(tmp_path)


def test_a_young_lock_is_a_build_at_work(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").touch()
    check_build_locks()


def test_a_start_removes_our_own_locks_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").symlink_to(".")
    os.utime(tmp_path / "op" / "lock", (0, 0))
    check_build_locks()


def test_the_command_ends_with_the_status(command):
    done = subprocess.run(
        [sys.executable, "run_pretrain.py", *command("--validate", "--expect_world_size", "3")],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "WRONG  batch" in done.stdout
    assert "ok     checksums: " in done.stdout
