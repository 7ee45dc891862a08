"""A run goes on where it is put: other ranks, ZeRO stages, precisions; or other data, if asked."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ds_deberta import build, hf
from ds_deberta.config import parse
from ds_deberta.data import load_tokenizer
from ds_deberta.plan import checkpoint_bytes, shape_of
from tests.checkpoints import tensors
from tests.launch import ROOT, run_ranks

STEPS = 10
# Name of a run -> its parts in turn: ranks, DeepSpeed JSON, and the step to which they train.
MOVES = {
    "one-two-one": [(1, "zero1_fp32", 4), (2, "zero3_fp32", 7), (1, "zero0_fp32", 10)],
    "two-three": [(2, "zero2_fp32", 5), (3, "zero3_fp32", 10)],
    "precisions": [
        (2, "zero1_fp32", 3),
        (2, "zero3_bf16_offload", 5),
        (2, "zero0_bf16", 8),
        (2, "zero2_fp32", 10),
    ],
}


def command(kind: str, config: str, step: int, data_dir: Path, model: Path, run: Path) -> list[str]:
    return [
        *("--objective", "mlm" if kind == "mlm" else "rtd"),
        *(() if kind == "mlm" else ("--embedding_sharing", kind)),
        *("--model", str(model), "--data_dir", str(data_dir), "--output_dir", str(run)),
        *("--deepspeed_config", str(ROOT / f"ds_configs/{config}.json")),
        *("--max_seq_length", "32", "--train_batch_size", "12", "--micro_batch_size", "2"),
        *("--num_training_steps", str(step), "--warmup", "2", "--lr_schedule", "constant"),
        *("--learning_rate", "1e-3", "--dropout", "0", "--num_workers", "0"),
        *("--log_interval", "1", "--eval_interval", "100", "--dump_interval", "100"),
    ]


def run_all(
    folder: Path,
    moves: dict,
    data_dir: Path,
    model: Path,
    *,
    kinds: Sequence[str] = ("gdes",),
    more: Sequence[tuple[int, list]] = (),
) -> Path:
    """Run every move beside an unbroken run, with as few starts as will do.

    Args:
        folder: gets a run KIND_NAME for each.
        moves: name -> parts.
        data_dir: prepared data.
        model: a config.json.
        kinds: "mlm", or a way to share embeddings, for each of which to do it.
        more: (ranks, lines for tests/workers/moved_runs.py) to do on the way.
    """
    moves = {"whole": [(1, "zero1_fp32", STEPS)], **moves}
    left = {name: list(parts) for name, parts in moves.items()}
    others = {ranks: list(lines) for ranks, lines in more}
    while any(left.values()):
        ranks = next(parts[0][0] for parts in left.values() if parts)
        lines = others.pop(ranks, [])
        for name, parts in left.items():
            while parts and parts[0][0] == ranks:
                _, config, step = parts.pop(0)
                runs = ((kind, folder / f"{kind}_{name}") for kind in kinds)
                lines += [
                    (command(k, config, step, data_dir, model, run), [], 0) for k, run in runs
                ]
        run_ranks(ROOT / "tests/workers/moved_runs.py", json.dumps(lines), world_size=ranks)
    return folder


@pytest.fixture(scope="module")
def runs(
    data_dir: Path,
    packed_data_dir: Path,
    short_data_dir: Path,
    tiny_model_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("moves")

    def line(kind: str, step: int, name: str, *flags: str, data: Path = data_dir) -> list[str]:
        return [*command(kind, "zero1_fp32", step, data, tiny_model_file, folder / name), *flags]

    others = ("--train_batch_size", "6", "--learning_rate", "5e-4", "--max_grad_norm", "0.5")
    accept = ("--accept_changes", "data", "train_batch_size", "learning_rate", "max_grad_norm")
    shorter = (*others, "--max_seq_length", "24", "--accept_changes", "data", "max_seq_length")
    full = line("gdes", STEPS, "full on the way", "--dump_interval", "4")
    changed = [
        (line("mlm", 2, "changed", "--warmup", "1"), [], 0),
        (line("mlm", 4, "changed", *others, *accept, data=packed_data_dir), [], 0),
        (line("mlm", 6, "changed", *others, data=packed_data_dir), [], 0),
        (line("mlm", 8, "changed", *shorter, data=short_data_dir), [], 0),
    ]
    failing = [
        (full, [4], 0),
        (line("gdes", 4, "full at the end", "--dump_interval", "3"), [4], 1),
    ]
    more = [(1, changed), (2, failing)]
    return run_all(folder, MOVES, data_dir, tiny_model_file, more=more)


@pytest.mark.distributed
def test_a_full_disk_costs_a_checkpoint_and_never_the_run(runs: Path) -> None:
    """On the second of two ranks: a save on the way is left out, the last one ends the run."""
    saved = {
        name: sorted(path.name for path in (runs / f"full {name}" / "checkpoints").iterdir())
        for name in ("on the way", "at the end")
    }
    assert saved == {
        "on the way": ["step_0000008", "step_0000010"],
        "at the end": ["step_0000003"],
    }
    found, truth = losses(runs / "full on the way"), losses(runs / "gdes_whole")
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)


@pytest.mark.distributed
def test_what_a_run_saved_is_exported_without_deepspeed(runs: Path, tmp_path: Path) -> None:
    checkpoint = runs / "gdes_two-three/checkpoints/step_0000010"
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from ds_deberta import hf\n"
        f"sys.argv = ['hf', {str(checkpoint)!r}, {str(tmp_path / 'out')!r}]\n"
        "hf.main()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
    for model in ("generator", "discriminator"):
        file = f"{model}/model.safetensors"
        exported = (tmp_path / "out" / file).read_bytes()
        assert exported == (runs / "gdes_two-three/export" / file).read_bytes()

    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    file = damaged / "generator/weights-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"generator/weights-00001.* has another sha256"):
        hf.export_checkpoint(damaged, tmp_path / "out2")


@pytest.mark.distributed
def test_a_checkpoint_is_as_large_as_planned(runs: Path) -> None:
    run = parse(["--config", str(runs / "gdes_whole" / "config.json")])
    configs = build.model_configs(run, load_tokenizer(run.data.data_dir))
    ds_config = build.build_ds_configs(run, configs)["generator"]
    saved = runs / f"gdes_whole/checkpoints/step_{STEPS:07d}"
    held = sum(
        tensor.nbytes
        for model in ("generator", "discriminator")
        for kind in ("weights", "exp_avg", "exp_avg_sq")
        for tensor in tensors(saved / model, kind).values()
    )
    assert checkpoint_bytes(shape_of(run, configs, ds_config, "cpu")) == held


@pytest.mark.distributed
def test_settings_change_when_asked(runs: Path) -> None:
    """Other data are read from their first row on; then a plain resume goes on in them."""
    run = runs / "changed"
    states = [
        json.loads((run / f"checkpoints/step_{n:07d}/checkpoint.json").read_text())["state"]
        for n in (4, 6, 8)
    ]
    assert [state["consumed_samples"] for state in states] == [12, 24, 12]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if row["split"] == "train"]
    assert rates == pytest.approx([1e-3] * 2 + [5e-4] * 6)  # a warm-up of one step is none


def losses(run: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = ("mlm_loss",) if "mlm_loss" in rows[0] else ("generator_loss", "discriminator_loss")
    return torch.tensor([[row[name] for name in names] for row in rows])


@pytest.mark.distributed
@pytest.mark.parametrize("name", MOVES)
def test_a_moved_run_is_the_unbroken_run(runs: Path, name: str) -> None:
    check_move(runs, "gdes", name, MOVES[name])


def check_move(runs: Path, kind: str, name: str, parts: list[tuple[int, str, int]]) -> None:
    """Compare losses, weights and moments with the unbroken run's."""
    whole, moved = runs / f"{kind}_whole", runs / f"{kind}_{name}"
    is_rounded = any("16" in config for _, config, _ in parts)
    truth = losses(whole)
    assert (truth[0] - truth[-1]).abs().max() > 0.1  # it did train
    # In fp32 only the order of sums differs; bf16 (fp16: better) knows a loss of 6 to about 0.02.
    tolerance = 0.03 if is_rounded else 1e-5
    torch.testing.assert_close(losses(moved), truth, rtol=0, atol=tolerance)

    saved = f"checkpoints/step_{STEPS:07d}"
    description = json.loads((moved / saved / "checkpoint.json").read_text())
    assert description["placement"]["world size"] == parts[-1][0]
    for model, numbers in description["numbers"].items():
        assert numbers["optimizer"]["step"] == numbers["schedule"] == STEPS
        assert numbers["global_steps"] == STEPS
        for kind_of_state, atol in (("weights", 1e-5), ("exp_avg", 1e-5), ("exp_avg_sq", 1e-6)):
            expected = tensors(whole / saved / model, kind_of_state)
            found = tensors(moved / saved / model, kind_of_state)
            assert found.keys() == expected.keys() != set()
            if is_rounded:
                continue
            for each, tensor in expected.items():
                if each.endswith("key_proj.bias") and kind_of_state == "weights":
                    continue  # its true gradient is zero: Adam turns rounding into full steps
                # Adam moves an entry whose gradient is nearly rounding by up to lr: allow a few.
                away = (found[each] - tensor).abs() > atol
                assert away.float().mean() < 0.005, each
