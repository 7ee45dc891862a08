"""A run goes on between NVMe, CPU memory and plain ZeRO; nothing of it stays on the disk."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints import check_same_bits
from tests.launch import ROOT, free_port, run_ranks
from tests.test_moves import command
from tests.test_stop import BIN, Run

STEPS = 6
PARTS = {
    "nvme": [("nvme", 2), ("nvme", 4), ("nvme", 6)],
    "to nvme": [("offload", 2), ("nvme", 6)],
    "from nvme": [("nvme", 4), ("offload", 6)],
    "plain between": [("nvme", 2), ("plain", 4), ("nvme", 6)],
}
needs_libaio = pytest.mark.skipif(
    not Path("/usr/include/libaio.h").exists(),
    reason="apt-get install libaio-dev; g++ takes minutes",
)


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where DeepSpeed builds, once for all tests here."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")  # one ninja, or it rebuilds
        yield folder


@pytest.mark.slow
@needs_libaio
@pytest.mark.distributed
def test_a_run_starts_after_one_that_was_killed_while_it_built(
    data_dir, tiny_config, tmp_path, built
):
    """DeepSpeed's async_io takes minutes to build. Two ranks, who both want it, are killed."""
    model, swap = tmp_path / "model.json", tmp_path / "swap"
    model.write_text(json.dumps(tiny_config.to_dict()))
    swap.mkdir()
    nvme = json.loads((ROOT / "ds_configs/zero3_bf16_nvme.json").read_text())
    nvme["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(swap)
    (tmp_path / "nvme.json").write_text(json.dumps(nvme))
    flags = command("mlm", "unused", 2, data_dir, model, tmp_path / "unused")

    def start() -> Run:
        port = ("--master_port", str(free_port()))
        return Run(
            *(tmp_path / "run", "deepspeed", "--num_accelerators", "2", *port),
            *("run_pretrain.py", *flags, "--deepspeed_config", str(tmp_path / "nvme.json")),
        )

    with start() as killed:
        killed.wait_for(lambda: list(built.glob("async_io/*.o")), 300)
        for process in killed.processes():
            with suppress(ProcessLookupError):  # its launcher, killed before it, has ended it
                os.kill(process, signal.SIGKILL)
    assert (built / "async_io/lock").exists()
    with start() as run:
        assert run.launcher.wait(1200) == 0, run.log.read_text()
    assert (tmp_path / "run/export").is_dir()
    assert not list(swap.iterdir())
    assert not list(built.glob("*/lock"))


@pytest.mark.slow
@needs_libaio
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_the_same_wherever_its_optimizer_state_is(data_dir, tiny_config, tmp_path, ranks):
    """Bit for bit, over every move. Nothing is left in `nvme_path`, of dead processes neither."""
    # DeepSpeed leaves what has less than 1 MiB in memory; of this both engines swap a group.
    model, swap = tmp_path / "model.json", tmp_path / "swap"
    model.write_text(json.dumps(replace(tiny_config, hidden_size=256).to_dict()))
    dead = swap / f"ds_deberta_{os.getuid()}_dead"
    dead.mkdir(parents=True)
    (dead / "0_40.tensor.swp").touch()
    nvme = json.loads((ROOT / "ds_configs/zero3_bf16_nvme.json").read_text())
    nvme["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(swap)
    (tmp_path / "nvme.json").write_text(json.dumps(nvme))
    files = {"nvme": tmp_path / "nvme.json"}
    files |= {"offload": ROOT / "ds_configs/zero3_bf16_offload.json"}
    files |= {"plain": ROOT / "ds_configs/zero1_bf16.json"}
    lines = []
    for name, parts in {"whole": [("offload", STEPS)], **PARTS}.items():
        for config, step in parts:
            line = command("gdes", "unused", step, data_dir, model, tmp_path / name)
            lines.append(([*line, "--deepspeed_config", str(files[config])], [], 0))
    worker = ROOT / "tests/workers/moved_runs.py"
    run_ranks(worker, json.dumps(lines), world_size=ranks, timeout=1200)

    def losses(name: str) -> list[list[float]]:
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [
            [row["generator_loss"], row["discriminator_loss"]]
            for row in rows
            if row["split"] == "train"
        ]

    truth = losses("whole")
    assert abs(truth[0][0] - truth[-1][0]) > 0.1  # it did train
    for name in PARTS:
        if name == "plain between":  # bf16 knows a loss of 6 to about 0.02
            torch.testing.assert_close(losses(name), truth, rtol=0, atol=0.03)
            continue
        assert losses(name) == truth
        saved = f"checkpoints/step_{STEPS:07d}"
        check_same_bits(tmp_path / name / saved, tmp_path / "whole" / saved)
    assert not list(swap.iterdir())
