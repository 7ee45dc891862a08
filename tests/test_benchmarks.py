"""The benchmarks run; what they measure is not a matter of tests."""

import re
import subprocess
import sys

import pytest

from tests.launch import ROOT


@pytest.mark.parametrize("objective", ["rtd", "mlm"])
def test_a_preset_is_measured_with_its_parts(objective: str) -> None:
    args = ["--preset", "deberta-v3-nano", "--rows", "2", "--length", "16", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", *args, "--objective", objective, "--profile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for part in ("| cpu | ", "| reference | ", "forward | ", "update | ", "the rest |", "aten::"):
        assert part in done.stdout


def test_a_start_of_learning_is_watched_seed_by_seed(data_dir) -> None:
    args = ["--data_dir", str(data_dir), "--steps", "4", "--seeds", "2", "--every", "2"]
    flags = ["--train_batch_size", "4", "--micro_batch_size", "4", "--warmup", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/learning_start.py", *args, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\| 4 \| (\d) \| (.*?) \|", done.stdout, re.MULTILINE) == [
        ("0", "**not within 2 steps**"),
        ("1", "**not within 2 steps**"),
    ]
