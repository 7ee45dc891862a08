"""Two nodes, as users start them: by a hostfile, by deepspeed on each, by variables on each."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launch import ROOT, left_in_shared_memory, run_ranks
from tests.test_stop import Run
from tests.two_nodes import NAMES, missing, on, two_nodes

LAUNCH = (sys.executable, "-m", "ds_deberta.launch")
BY_NODE = ("--no_ssh", "--master_addr", NAMES[0], "--master_port", "29755", "--node_rank")
ENDLESS = ("--num_training_steps", "1000000", "--dump_interval", "1000000")
STEPS = 3

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory):
    if reason := missing():
        pytest.skip(reason)
    with two_nodes(tmp_path_factory.mktemp("nodes")) as folder:
        exports = {"GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        (folder / "deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in exports.items()))
        path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
        environment = {
            "PATH": path + os.environ["PATH"],
            "DS_ENV_FILE": str(folder / "deepspeed_env"),
        }
        yield folder, environment | exports


@pytest.fixture(scope="module")
def flags(data_dir: Path, tiny_model_file: Path) -> list[str]:
    return [
        *("run_pretrain.py", "--objective", "mlm", "--model", str(tiny_model_file)),
        *("--data_dir", str(data_dir), "--max_seq_length", "32", "--train_batch_size", "4"),
        *("--deepspeed_config", "ds_configs/zero2_fp32.json", "--num_workers", "0"),
        *("--lr_schedule", "constant", "--warmup", "1", "--log_interval", "1"),
    ]


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["mlm_loss"] for row in rows if row["split"] == "train"]


@pytest.fixture(scope="module")
def local_losses(flags, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the first steps, on two processes without nodes."""
    folder = tmp_path_factory.mktemp("local")
    command = [*flags[1:], "--num_training_steps", str(STEPS), "--output_dir", str(folder)]
    run_ranks(ROOT / "tests/workers/pretrain_runs.py", json.dumps([command]), world_size=2)
    return losses(folder)[:STEPS]


def test_sigterm_saves_on_all_nodes_of_a_hostfile(network, flags, local_losses, tmp_path):
    folder, environment = network
    options = ("--hostfile", str(folder / "hostfile"), "--master_addr", NAMES[0])
    words = [*on(0), *LAUNCH, *options, *flags, *ENDLESS, "--expect_world_size", "2"]
    with Run(tmp_path / "run", *words, **environment) as run:
        run.wait_for(lambda: run.has_logged(STEPS))
        run.launcher.send_signal(signal.SIGTERM)
        assert run.launcher.wait(25) == 143
        run.check_saved()
    assert losses(tmp_path / "run")[:STEPS] == local_losses


@pytest.mark.parametrize("way", ["options", "variables"])
def test_a_crash_on_one_node_ends_the_other(network, flags, local_losses, tmp_path, way):
    """Nodes that were started one by one: by deepspeed's options, and by node variables."""
    folder, environment = network

    def node(number: int) -> Run:
        start, variables = (), {"WORLD_SIZE": "2", "RANK": str(number), "MASTER_ADDR": NAMES[0]}
        if way == "options":
            start, variables = (*BY_NODE, str(number), "--hostfile", f"{folder}/hostfile"), {}
        words = [*on(number), *LAUNCH, *start, *flags, *ENDLESS]
        log = tmp_path / f"node{number}.log"
        return Run(tmp_path / "run", *words, log=log, **environment, **variables)

    with node(0) as first, node(1) as second:
        first.wait_for(lambda: first.has_logged(STEPS))
        (crashing,) = first.processes(RANK="1", LOCAL_RANK="0")
        crashed = time.monotonic()
        os.kill(crashing, signal.SIGSEGV)
        for run in (first, second):
            run.wait_for(lambda run=run: run.launcher.poll() is not None, 10)
            assert run.launcher.returncode
        first.wait_for(lambda: not first.processes(), 1)
        assert time.monotonic() - crashed < 10
        assert not left_in_shared_memory(first.shared_memory)
    assert losses(tmp_path / "run")[:STEPS] == local_losses
