"""metrics.jsonl and TensorBoard: each step once, whatever happened on the way."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch import ROOT, run_ranks
from tests.test_metrics import make_tracker, metrics, rows
from tests.test_stop import PYTHON, Run

WHOLE = "step_" + "?" * 7  # without those that are being written


@pytest.fixture
def flags(data_dir: Path, tiny_model_file: Path) -> list[str]:
    return [
        *("--objective", "mlm", "--model", str(tiny_model_file), "--data_dir", str(data_dir)),
        *("--deepspeed_config", str(ROOT / "ds_configs/zero0_fp32.json"), "--log_interval", "1"),
        *("--max_seq_length", "32", "--train_batch_size", "4", "--num_workers", "0"),
        *("--dump_interval", "4", "--eval_interval", "1000000", "--warmup", "1"),
    ]


def curve(folder: Path, name: str = "loss/mlm_loss/train") -> list[int]:
    """The steps of a curve as TensorBoard shows it."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars(name)]


@pytest.mark.slow
@pytest.mark.distributed
def test_each_step_comes_once_after_a_kill_and_a_resume_from_before(flags, tmp_path):
    folder = tmp_path / "run"
    with Run(folder, *PYTHON, *flags, "--num_training_steps", "1000000") as run:
        run.wait_for(lambda: any((folder / "checkpoints").glob(WHOLE)) and run.has_logged(6))
        os.kill(run.launcher.pid, signal.SIGKILL)
        run.launcher.wait()
    reached = rows(folder)[-1]["step"]
    saved = max((folder / "checkpoints").glob(WHOLE))
    steps = reached + 2
    more = ["--output_dir", str(folder), "--num_training_steps", str(steps)]
    printed = run_ranks(ROOT / "run_pretrain.py", *flags, *more)
    assert f"resumed from {saved}" in printed
    train = [row["step"] for row in rows(folder) if row["split"] == "train"]
    assert train == list(range(1, steps + 1))
    assert curve(folder) == train
    print(f"killed at step {reached}, resumed from {saved.name}: {steps} steps, each once")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command).returncode:
        pytest.skip("may not mount a small disk (needs root on Linux)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte of room; delete the file to give it back."""
    file = disk / "filling"
    with file.open("ab", buffering=0) as out:
        for size in (4096, 1):
            try:
                while True:
                    out.write(b"x" * size)
            except OSError:
                continue
    return file


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_delays_the_metrics_and_loses_none(small_disk, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ds_deberta"), "propagate", True)
    tracker = make_tracker(small_disk)
    for step in range(1, 4):
        tracker.update(metrics(1.0, 10))
        tracker.log(step, {})
    filling = fill(small_disk)
    for step in range(4, 60):  # more than what is left of the last page
        tracker.update(metrics(1.0, 10))
        tracker.log(step, {})
    assert any("metrics.jsonl can not be written" in line for line in caplog.messages)
    found = rows(small_disk)  # whole lines
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert len(found) < 59
    filling.unlink()
    time.sleep(1)  # TensorBoard orders its files by the second
    tracker.update(metrics(1.0, 10))
    tracker.log(60, {})
    tracker.close()
    assert [row["step"] for row in rows(small_disk)] == list(range(1, 61))
    shown = curve(small_disk, "loss/generator_loss/train")
    assert shown == sorted(set(shown))
    assert {1, 2, 3, 60} <= set(shown)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_training_goes_on_while_the_disk_of_its_metrics_is_full(flags, small_disk, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "tensorboard"):
        (folder / name).symlink_to(small_disk / name)
    (small_disk / "tensorboard").mkdir()
    flags = [*flags, "--num_training_steps", "100"]
    with Run(folder, *PYTHON, *flags) as run:
        run.wait_for(lambda: run.has_logged(3))
        filling = fill(small_disk)
        run.wait_for(lambda: "can not be written" in run.log.read_text())
        checkpoints = len(list((folder / "checkpoints").glob("step_*")))
        filling.unlink()
        assert run.launcher.wait(120) == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [x["step"] for x in map(json.loads, lines) if x["split"] == "train"] == [*range(1, 101)]
    assert (folder / "export/model/model.safetensors").is_file()
    print(f"the disk was full with {checkpoints} checkpoints written; 100 of 100 steps in the file")
