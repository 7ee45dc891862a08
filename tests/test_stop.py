"""Stop means saved: whoever gets the signal, all ranks save together and leave no one behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints import tensors
from tests.launch import (
    ROOT,
    clean_environment,
    free_port,
    left_in_shared_memory,
    processes_with,
    run_ranks,
)

BIN = Path(sys.executable).parent
PYTHON = (sys.executable, "run_pretrain.py")
MLM = ("run_pretrain.py", "--objective", "mlm")


class Run:
    """A run of run_pretrain.py behind some launcher; leaving kills what is left of it."""

    def __init__(
        self, folder: Path, *command: str, log: Path | None = None, **environment: str
    ) -> None:
        self.folder = folder
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.log = log or folder.with_suffix(".log")
        with self.log.open("w") as output:
            self.launcher = subprocess.Popen(
                [*command, "--output_dir", str(folder)],
                cwd=ROOT,
                env=clean_environment()
                | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
                | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # as a shell does with a job of its own
                # Tests may be in the background of a script, where Ctrl-C is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self.launcher.pid, *self.processes()]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launcher.wait()

    def processes(self, **environment: str) -> list[int]:
        """The live processes of the run, workers included, or those with these variables."""
        return processes_with(str(self.folder), **environment)

    def wait_for(self, what: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def has_logged(self, steps: int) -> bool:
        file = self.folder / "metrics.jsonl"
        return file.exists() and len(file.read_text().splitlines()) >= steps

    def check_saved(self) -> int:
        """All of it leaves within 25 s and leaves one checkpoint; returns the step."""
        self.wait_for(lambda: not self.processes(), 25)
        assert not left_in_shared_memory(self.shared_memory)
        (saved,) = (self.folder / "checkpoints").iterdir()
        assert f"stopped after step {int(saved.name[-7:])}" in self.log.read_text()
        return int(saved.name[-7:])


@pytest.fixture
def flags(data_dir: Path, tiny_model_file: Path) -> list[str]:
    return [
        *("--model", str(tiny_model_file), "--data_dir", str(data_dir)),
        *("--deepspeed_config", str(ROOT / "ds_configs/zero1_fp32.json"), "--dropout", "0.1"),
        *("--max_seq_length", "32", "--train_batch_size", "4", "--micro_batch_size", "1"),
        *("--warmup", "3", "--lr_schedule", "constant", "--log_interval", "1"),
    ]


ENDLESS = ("--num_training_steps", "1000000", "--dump_interval", "1000000")


def rows(folder: Path) -> list[dict]:
    timings = ("tokens_per_second", "mfu", "step_seconds", "data_wait_fraction", "memory_gib")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    measured = (row for row in lines if row["split"] in ("train", "valid"))  # without warnings
    return [{k: v for k, v in row.items() if k not in timings} for row in measured]


@pytest.mark.distributed
def test_a_stopped_run_goes_on_as_if_it_had_not(flags, tmp_path):
    """One process, evaluating after every step, so that the signal most likely falls there."""
    flags += ["--objective", "rtd", "--eval_interval", "1", "--num_workers", "1"]
    with Run(tmp_path / "run", *PYTHON, *flags, *ENDLESS) as run:
        run.wait_for(lambda: run.has_logged(5))
        # To the worker too, as Slurm's --signal, or a terminal's Ctrl-C.
        os.killpg(run.launcher.pid, signal.SIGUSR1)
        assert run.launcher.wait(25) == 138
        step = run.check_saved()
    ending = [*flags, "--num_training_steps", str(step + 3)]
    commands = [[*ending, "--output_dir", str(tmp_path / name)] for name in ("run", "whole")]
    run_ranks(ROOT / "tests/workers/pretrain_runs.py", json.dumps(commands))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    for model in ("generator", "discriminator"):
        stopped, whole = (
            tensors(tmp_path / name / f"checkpoints/step_{step + 3:07d}" / model)
            for name in ("run", "whole")
        )
        assert all(torch.equal(stopped[name], whole[name]) for name in whole)


@pytest.mark.distributed
def test_sigterm_to_the_deepspeed_launcher_stops_all_ranks(flags, tmp_path):
    """It passes nothing on and is gone at once; the ranks notice."""
    command, port = ("deepspeed", "--num_accelerators", "2"), str(free_port())
    with Run(tmp_path / "run", *command, *MLM, *flags, *ENDLESS, MASTER_PORT=port) as run:
        run.wait_for(lambda: run.has_logged(3))
        assert f"first one at 127.0.0.1:{port}" in run.log.read_text()
        run.launcher.send_signal(signal.SIGTERM)
        assert run.launcher.wait(25) == -signal.SIGTERM
        run.check_saved()


@pytest.mark.distributed
def test_sigterm_to_one_rank_stops_all_ranks(flags, tmp_path):
    command = ("torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()))
    with Run(tmp_path / "run", *command, *MLM, *flags, *ENDLESS, "--num_workers", "0") as run:
        run.wait_for(lambda: run.has_logged(3))
        (rank,) = run.processes(RANK="1")
        os.kill(rank, signal.SIGTERM)
        assert run.launcher.wait(25) == 1  # torchrun's own; it prints the rank's 143
        assert "exitcode  : 143" in run.log.read_text()
        run.check_saved()


@pytest.mark.distributed
def test_ctrl_c_on_one_node_of_two_stops_both(flags, tmp_path):
    """As the original's: mlm.sh on each node, with variables that count nodes."""
    nodes = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ("./mlm.sh", "bert-base", *flags, *ENDLESS, "--expect_world_size", "2")
    with (
        Run(tmp_path / "run", *command, **nodes, RANK="0", log=tmp_path / "0.log") as first,
        Run(tmp_path / "run", *command, **nodes, RANK="1", log=tmp_path / "1.log") as second,
    ):
        first.wait_for(lambda: first.has_logged(3))
        os.killpg(second.launcher.pid, signal.SIGINT)
        assert first.launcher.wait(25) == second.launcher.wait(25) == 130
        first.check_saved()


def test_a_second_signal_ends_a_stuck_process(tmp_path):
    program = (
        "import time; from ds_deberta import stop; stop.ONE_REQUEST_SECONDS = 0.3\n"
        "with stop.StopRequest() as request:\n"
        "    print('ready', flush=True)\n"
        "    while not request._asked: time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # a launcher's repetition: the same request
        assert process.stdout.readline() == "asked\n"
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143
