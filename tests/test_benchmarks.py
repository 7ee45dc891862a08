"""The benchmarks run; what they measure is not a matter of tests."""

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
