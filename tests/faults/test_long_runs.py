"""Long runs stay level: memory, open files, threads and speed do not drift over 2,000 steps."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.launch import ROOT, clean_environment

STEPS = 2000
WARM = 600  # three evaluations and checkpoints: everything has been allocated once


@pytest.mark.slow
@pytest.mark.distributed
def test_memory_files_threads_and_speed_stay_level_over_2000_steps(data_dir, tmp_path):
    command = [
        *(sys.executable, "run_pretrain.py", "--objective", "rtd", "--model", "deberta-v3-nano"),
        *("--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run")),
        *("--num_training_steps", str(STEPS), "--dump_interval", "200", "--log_interval", "50"),
        *("--num_workers", "1"),
    ]
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(), stdout=output, stderr=output
        )
        try:
            samples = watch(process, tmp_path / "run" / "metrics.jsonl")
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        assert process.returncode == 0, output.read()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    speeds = [
        row["tokens_per_second"] for row in rows if row["split"] == "train" and row["step"] > WARM
    ]
    earlier, later = np.array_split(speeds, 2)
    steps, memory, files, threads = np.array([s for s in samples if s[0] > WARM]).T
    slope = np.polyfit(steps, memory, 1)[0] * 100  # of a line through all samples
    print(
        f"{len(steps)} samples from step {WARM} to {STEPS}: {memory[-1]:.0f} MiB, "
        f"{slope:+.3f} MiB per 100 steps; open files {files.min()}-{files.max()}, threads "
        f"{threads.min()}-{threads.max()}; {earlier.mean():,.0f} +- {earlier.std():,.0f} "
        f"tokens/s, later {later.mean():,.0f} +- {later.std():,.0f}"
    )
    assert len(steps) > 100
    assert slope < 1.0
    for counts in (files, threads):  # the quiet level; more are open during a checkpoint
        early, late = np.array_split(counts, 2)
        assert np.median(late) <= np.median(early)
    noise = max(earlier.std(), later.std())
    assert later.mean() > earlier.mean() - 2 * noise


def watch(process: subprocess.Popen, metrics: Path) -> list[tuple[int, float, int, int]]:
    """Until it ends: (last logged step, resident MiB, open files, threads), five times a second."""
    samples = []
    folder = Path("/proc", str(process.pid))
    deadline = time.monotonic() + 1500
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            status = dict(
                line.split(":", 1) for line in (folder / "status").read_text().splitlines()
            )
            files = len(list((folder / "fd").iterdir()))
            memory = int(status["VmRSS"].split()[0]) / 1024
        except (OSError, KeyError):
            continue  # it has just ended
        samples.append((last_step(metrics), memory, files, int(status["Threads"])))
    return samples


def last_step(metrics: Path) -> int:
    """The newest step that the run has logged."""
    if not metrics.exists():
        return 0
    *_, last = ["", *metrics.read_text().splitlines()]
    return json.loads(last)["step"] if last.endswith("}") else 0
