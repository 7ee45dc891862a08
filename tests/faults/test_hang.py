"""A rank that hangs does not hang the run: stacks are left, all ends, nothing stays."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.launch import ROOT, clean_environment, free_port, left_in_shared_memory
from tests.test_stop import ENDLESS, MLM, PYTHON, Run, flags  # noqa: F401 - flags is a fixture

TIMEOUT = 6  # seconds; a step of these runs takes hundredths of one


def stacks(run: Run) -> dict[int, str]:
    """What each rank left."""
    files = (run.folder / "stacks").glob("*")
    return {int(re.findall(r"rank_(\d+)", file.name)[0]): file.read_text() for file in files}


@pytest.mark.distributed
def test_a_rank_stuck_in_data_loading_leaves_its_stacks_and_ends(flags, tmp_path):  # noqa: F811
    hang = ("--hang_timeout", str(TIMEOUT), "--num_workers", "1")
    with Run(tmp_path / "run", *PYTHON, *MLM[1:], *flags, *ENDLESS, *hang) as run:
        run.wait_for(lambda: run.has_logged(3))
        (worker,) = (p for p in run.processes() if p != run.launcher.pid)
        os.kill(worker, signal.SIGSTOP)
        assert run.launcher.wait(60) == 1
        run.wait_for(lambda: not run.processes(), 10)
        (stack,) = stacks(run).values()
        assert "trainer.py" in stack
        assert "in train" in stack
        assert f"rank 0 has made no progress for {TIMEOUT} s" in run.log.read_text()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "launch"])
def test_a_stopped_rank_does_not_hang_the_run(flags, tmp_path, launcher):  # noqa: F811
    port = str(free_port())
    command = {
        "deepspeed": ("deepspeed", "--num_accelerators", "2", "--master_port", port),
        "torchrun": ("torchrun", "--nproc_per_node", "2", "--master_port", port),
        "launch": (sys.executable, "-m", "ds_deberta.launch", "--procs_per_node", "2"),
    }[launcher]
    hang = ("--hang_timeout", str(TIMEOUT))
    with Run(tmp_path / "run", *command, *MLM, *flags, *ENDLESS, *hang) as run:
        run.wait_for(lambda: run.has_logged(3))
        (rank, *workers) = sorted(run.processes(RANK="1"))
        assert len(workers) == 2
        os.kill(rank, signal.SIGSTOP)
        # The launchers wait 30 s for whom they have asked to leave before they kill.
        assert run.launcher.wait(120) == 1
        run.wait_for(lambda: not run.processes(), 40)
        assert not left_in_shared_memory(run.shared_memory)
        assert set(stacks(run)) == {0}
        assert re.search(r'trainer\.py", line \d+ in train\n', stacks(run)[0])


def watch(program: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import ctypes, time; from pathlib import Path; from ds_deberta import watchdog\n"
        "watchdog._SECONDS_FOR_PYTHON = 1.0\n"
        "with watchdog.Watchdog(Path('stacks'), {timeout}) as dog:\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code.replace("{timeout}", "1.0") + program],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_progress_however_slow_is_no_hang():
    """As in an evaluation: 0.6 of the timeout for each batch, four times."""
    done = watch("    for _ in dog.over(range(4)): time.sleep(0.6)\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_stuck_inside_python_ends_too():
    """No thread of python can run in it."""
    done = watch("    ctypes.PyDLL(None).sleep(60)\n")
    assert done.returncode == 1
    assert "Timeout" in done.stderr
