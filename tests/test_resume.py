"""A resumed run is the unbroken run: bit for bit, in a new process, with dropout on."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import check_same_bits
from tests.launch import ROOT, run_ranks

_TEST = "test_ten_steps_equal_five_and_three_and_two"
WORKER = ROOT / "tests/workers/pretrain_runs.py"
KINDS = ["mlm", "gdes", "es", "nes"]
CASES = [(kind, stage) for kind in KINDS for stage in (0, 1, 2, 3)]
QUICK = [("gdes", 0), ("mlm", 1), ("es", 2), ("gdes", 3)]


def command(
    kind: str, stage: int, steps: int, data_dir: Path, model: Path, output_dir: Path
) -> list[str]:
    return [
        *("--objective", "mlm" if kind == "mlm" else "rtd"),
        *("--model", str(model)),
        *("--data_dir", str(data_dir)),
        *("--output_dir", str(output_dir / f"{kind}_{stage}")),
        *("--deepspeed_config", str(ROOT / f"ds_configs/zero{stage}_fp32.json")),
        *(() if kind == "mlm" else ("--embedding_sharing", kind)),
        *("--max_seq_length", "32", "--train_batch_size", "8", "--micro_batch_size", "2"),
        *("--num_training_steps", str(steps), "--warmup", "3", "--lr_schedule", "constant"),
        *("--learning_rate", "1e-3", "--dropout", "0.1", "--num_workers", "0"),
        *("--log_interval", "1", "--eval_interval", "4", "--dump_interval", "100"),
    ]


@pytest.fixture(scope="module")
def runs(
    data_dir: Path,
    tiny_model_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> tuple[Path, Path]:
    """10 steps in one go, and 5 + 3 + 2 steps in three processes, of all that is asked for."""
    wanted = {item.name for item in request.session.items}
    cases = [(kind, stage) for kind, stage in CASES if f"{_TEST}[{kind}-{stage}]" in wanted]
    whole, parts = (tmp_path_factory.mktemp(name) for name in ("whole", "parts"))
    for folder, steps in ((whole, 10), (parts, 5), (parts, 8), (parts, 10)):
        lines = [command(*case, steps, data_dir, tiny_model_file, folder) for case in cases]
        run_ranks(WORKER, json.dumps(lines), world_size=2)
    return whole, parts


def train_rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("tokens_per_second", "mfu", "step_seconds", "data_wait_fraction", "memory_gib")
    return [
        {k: v for k, v in row.items() if k not in timings}
        for row in rows
        if row["split"] == "train"
    ]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "stage"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_ten_steps_equal_five_and_three_and_two(
    runs: tuple[Path, Path], kind: str, stage: int
) -> None:
    whole, parts = (run / f"{kind}_{stage}" for run in runs)
    rows = train_rows(whole)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert train_rows(parts) == rows

    saved = "checkpoints/step_0000010"
    check_same_bits(parts / saved, whole / saved)
