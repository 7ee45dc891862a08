"""Stop means saved, also while a checkpoint is written or an evaluation is made."""

import json
import os
import signal

import pytest
import torch

from tests.checkpoints import tensors
from tests.launch import ROOT, free_port, run_ranks
from tests.test_stop import ENDLESS, Run, flags, rows  # noqa: F401 - flags is a fixture


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("moment", "ranks"), [("saving", ["1"]), ("saving", ["0", "1"]), ("evaluating", ["0", "1"])]
)
def test_a_stop_in_the_middle_of_something_is_saved(flags, tmp_path, moment, ranks):  # noqa: F811
    flags += ["--objective", "rtd", "--num_workers", "0", "--keep_checkpoints", "1"]
    flags += {"saving": ["--eval_interval", "3"], "evaluating": ["--eval_interval", "2"]}[moment]
    intervals = ["--dump_interval", "3"] if moment == "saving" else ["--dump_interval", "1000"]
    command = ("torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()))
    slow = (*command, "tests/workers/slow_run.py", *flags, *ENDLESS[:2], *intervals)
    with Run(tmp_path / "run", *slow) as run:
        run.wait_for(lambda: (run.folder / moment).exists(), 180)
        for number in ranks:
            (rank,) = run.processes(RANK=number)
            os.kill(rank, signal.SIGTERM)
        assert run.launcher.wait(25) == 1  # torchrun's own; it prints the rank's 143
        assert "exitcode  : 143" in run.log.read_text()
        step = run.check_saved()
    ending = [*flags, "--dump_interval", "1000", "--num_training_steps", str(step + 3)]
    commands = [[*ending, "--output_dir", str(tmp_path / name)] for name in ("run", "whole")]
    run_ranks(ROOT / "tests/workers/pretrain_runs.py", json.dumps(commands), world_size=2)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    for model in ("generator", "discriminator"):
        stopped, whole = (
            tensors(tmp_path / name / f"checkpoints/step_{step + 3:07d}" / model)
            for name in ("run", "whole")
        )
        assert all(torch.equal(stopped[name], whole[name]) for name in whole)
