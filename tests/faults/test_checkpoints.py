"""Checkpoints survive: killed saves, and moves over every stage and precision."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ds_deberta.checkpoint import check_files, read_description
from tests.checkpoints import check_same_bits
from tests.launch import ROOT, clean_environment, free_port, processes_with, run_ranks
from tests.test_moves import MOVES as SHORT_MOVES
from tests.test_moves import check_move, command, run_all
from tests.test_resume import KINDS, train_rows

LONG_MOVES = {
    "three-two-one": [(3, "zero0_fp32", 4), (2, "zero1_fp32", 7), (1, "zero3_fp32", 10)],
    "stages": [(2, f"zero{stage}_fp32", step) for stage, step in ((0, 3), (3, 5), (1, 8), (2, 10))],
    "more precisions": [
        (2, config, step)
        for config, step in (
            ("zero1_fp32", 2),
            ("zero1_bf16", 4),
            ("zero0_bf16", 6),
            ("zero3_bf16_offload", 8),
            ("zero2_bf16_offload", 9),
            ("zero0_fp32", 10),
        )
    ],
    "halves": [
        *((1, "zero1_fp16", 2), (2, "zero3_bf16", 4), (2, "zero3_fp16", 6)),
        *((1, "zero2_fp32", 8), (3, "zero2_fp16", 10)),
    ],
    "bf16 grows": [(1, "zero2_bf16", 3), (3, "zero1_bf16", 6), (2, "zero3_bf16", 10)],
}
KILLS = 25


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_move_over_ranks_stages_and_precisions(data_dir, tiny_model_file, tmp_path):
    kinds, moves = ("mlm", "gdes"), SHORT_MOVES | LONG_MOVES
    run_all(tmp_path, moves, data_dir, tiny_model_file, kinds=kinds)
    for name, parts in moves.items():
        for kind in kinds:
            check_move(tmp_path, kind, name, parts)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero1_bf16", "zero3_bf16", "zero0_bf16", "zero2_fp32"])
def test_twenty_steps_in_four_processes_are_twenty_in_one(
    data_dir, tiny_model_file, tmp_path, config
):
    """Bit for bit, with dropout on, whatever is trained; and so is what was logged."""
    path = ROOT / f"ds_configs/{config}.json"
    check_twenty_steps(path, KINDS, data_dir, tiny_model_file, tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_loss_scales_of_fp16_go_on_where_they_were(data_dir, tiny_model_file, tmp_path, stage):
    """And so does all else, bit for bit, with updates skipped before and after a new start."""
    ds_config = json.loads((ROOT / f"ds_configs/zero{stage}_fp16.json").read_text())
    ds_config["fp16"] |= {"initial_scale_power": 21, "loss_scale_window": 2}
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(ds_config))
    check_twenty_steps(path, ("mlm", "gdes"), data_dir, tiny_model_file, tmp_path)
    rows = train_rows(tmp_path / "whole/mlm")
    scales = [row["loss_scale_model"] for row in rows]
    moves = [later / earlier for earlier, later in itertools.pairwise(scales)]
    assert all({0.5, 2.0} <= set(part) for part in (moves[:10], moves[10:])), scales
    assert 4 < rows[-1]["skipped_steps_model"] < 16


def check_twenty_steps(
    ds_config: Path, kinds: Sequence[str], data_dir: Path, model: Path, folder: Path
) -> None:
    """Compare 20 steps in one go to 20 in four processes."""
    for name, ends in (("whole", (20,)), ("parts", (3, 9, 14, 20))):
        for end in ends:
            lines = [
                [
                    *command(kind, "zero0_fp32", end, data_dir, model, folder / name / kind),
                    *("--deepspeed_config", str(ds_config), "--dropout", "0.1"),
                ]
                for kind in kinds
            ]
            run_ranks(ROOT / "tests/workers/pretrain_runs.py", json.dumps(lines), world_size=2)
    for kind in kinds:
        parts, whole = folder / "parts" / kind, folder / "whole" / kind
        saved = "checkpoints/step_0000020"
        check_same_bits(parts / saved, whole / saved)
        rows = train_rows(whole)
        assert [row["step"] for row in rows] == list(range(1, 21))
        assert train_rows(parts) == rows


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_moves_over_hierarchical_partitions(data_dir, tiny_model_file, tmp_path):
    """Four ranks in two groups that have all weights each: bit for bit what stage 3 is."""
    config = json.loads((ROOT / "ds_configs/zero3_bf16.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps(config))
    plain = ROOT / "ds_configs/zero3_bf16.json"
    lines = []
    for name, parts in (("whole", [(plain, 6)]), ("moved", [(groups, 2), (groups, 4), (plain, 6)])):
        for file, step in parts:
            line = command("gdes", "unused", step, data_dir, tiny_model_file, tmp_path / name)
            lines.append(
                ([*line, "--deepspeed_config", str(file), "--micro_batch_size", "1"], [], 0)
            )
    run_ranks(ROOT / "tests/workers/moved_runs.py", json.dumps(lines), world_size=4)
    saved = "checkpoints/step_0000006"
    check_same_bits(tmp_path / "moved" / saved, tmp_path / "whole" / saved)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_killed_at_any_moment_leaves_a_whole_checkpoint(data_dir, tiny_model_file, tmp_path):
    """Two ranks save after every step; one is killed, in turn, and the run started again."""
    rng = random.Random(5)
    place = tmp_path / "run/checkpoints"
    line = command("gdes", "zero1_fp32", 10**6, data_dir, tiny_model_file, tmp_path / "run")
    line += ["--dump_interval", "1", "--keep_checkpoints", "2"]
    launcher = ["torchrun", "--nproc_per_node", "2"]
    unfinished = 0
    for kill in range(KILLS):
        before = newest_whole(place)
        with (tmp_path / "log").open("w") as output:
            process = subprocess.Popen(
                [*launcher, "--master_port", str(free_port()), "run_pretrain.py", *line],
                cwd=ROOT,
                env=clean_environment()
                | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
                | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )
            try:
                deadline = time.monotonic() + 120
                while newest_whole(place) < before + 2:
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                    time.sleep(0.05)
                time.sleep(rng.random() * 0.4)
                (rank,) = processes_with(str(tmp_path / "run"), RANK=str(kill % 2))
                os.kill(rank, signal.SIGKILL)
                assert process.wait(60) != 0
            finally:
                for each in [process.pid, *processes_with(str(tmp_path / "run"))]:
                    try:
                        os.kill(each, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                process.wait()
        assert "is passed over" not in (tmp_path / "log").read_text()
        unfinished += any(path.suffix == ".tmp" for path in place.iterdir())
        assert newest_whole(place) >= before + 2
    assert unfinished > 0  # some did hit a save


def newest_whole(place: Path) -> int:
    """The newest step whose files are all as they were written; the others must not exist."""
    names = sorted(path for path in place.glob("step_*") if path.suffix != ".tmp")
    for path in reversed(names):
        try:
            check_files(path, read_description(path)["files"])
        except ValueError:
            if path.exists():
                raise
            continue  # rotated away meanwhile
        return int(path.name.removeprefix("step_"))
    return 0
