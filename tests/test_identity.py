"""What a resume refuses, and what it lists; with the flags of real runs and small engines."""

import json
from pathlib import Path

import pytest

from ds_deberta import build
from ds_deberta.checkpoint import Checkpointer, TrainState, _digest
from ds_deberta.config import parse
from ds_deberta.data import load_tokenizer
from ds_deberta.resolve import resolve
from tests.launch import ROOT
from tests.test_checkpoint import FakeEngine, log  # noqa: F401 - a fixture


@pytest.fixture
def run_of(data_dir, tiny_model_file, tmp_path):
    return lambda *flags: resolve(
        parse(
            [
                *("--objective", "rtd", "--model", str(tiny_model_file)),
                *("--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run")),
                *("--deepspeed_config", str(ROOT / "ds_configs/zero1_fp32.json")),
                *("--num_training_steps", "2000", *flags),
            ]
        )
    )


@pytest.fixture
def checkpointer(run_of, data_dir):
    return lambda *flags: build.build_checkpointer(run_of(*flags), load_tokenizer(data_dir))


def save(saver: Checkpointer) -> Path:
    saver.save(TrainState(10, 80), {"generator": FakeEngine(1), "discriminator": FakeEngine(2)})
    assert saver.current is not None
    return saver.current


def resume(saver: Checkpointer) -> TrainState:
    return saver.resume({"generator": FakeEngine(0), "discriminator": FakeEngine(0)})


def write_json(folder: Path, **changes) -> str:
    values = json.loads((ROOT / "ds_configs/zero1_fp32.json").read_text()) | changes
    (folder / "other.json").write_text(json.dumps(values))
    return str(folder / "other.json")


def test_what_moves_the_weights_is_refused_until_it_is_accepted(
    checkpointer,
    tmp_path,
    caplog,
    log,  # noqa: F811
):
    save(checkpointer())
    unclipped = write_json(tmp_path, gradient_clipping=220)
    for name, text, *flags in (
        ("rtd_lambda", "rtd_lambda: 10.0 then, 50.0 now", "--rtd_lambda", "50"),
        ("temperature", "temperature: 1.0 then, 0.7 now", "--temperature", "0.7"),
        ("max_grad_norm", "max_grad_norm: 1.0 then, 220 now", "--deepspeed_config", unclipped),
        ("max_grad_norm", "max_grad_norm: 1.0 then, 0.5 now", "--max_grad_norm", "0.5"),
    ):
        with pytest.raises(ValueError, match=rf"\({text}\).*--accept_changes {name}, or"):
            resume(checkpointer(*flags))
        caplog.clear()
        assert resume(checkpointer(*flags, "--accept_changes", name)).step == 10
        assert f"accepted: {text}" in log.text
    assert resume(checkpointer("--max_grad_norm", "1")).step == 10  # as the JSON has it


def test_all_other_changes_are_listed(checkpointer, caplog, log):  # noqa: F811
    save(checkpointer())
    resume(checkpointer("--num_workers", "2"))
    assert "changed since" not in log.text
    moved = str(ROOT / "ds_configs/zero2_fp32.json")
    resume(checkpointer("--num_training_steps", "4000", "--skip_samples", "3-5"))
    expected = 'checkpoint: skip_samples "" -> "3-5", num_training_steps 2,000 -> 4,000'
    assert expected in log.text
    caplog.clear()
    resume(checkpointer("--deepspeed_config", moved))
    assert "checkpoint: deepspeed.prescale_gradients none -> true, deepspeed.zero_" in log.text
    assert "zero_optimization.stage 1 -> 2" in log.text


def test_a_checkpoint_that_says_less_is_resumed(checkpointer, log):  # noqa: F811
    """Older programs wrote down neither settings nor the RTD loss, and only the clipping's flag."""
    file = save(checkpointer()) / "checkpoint.json"
    description = json.loads(file.read_text())
    del description["settings"], description["sha256"]
    for name in ("rtd_lambda", "temperature"):
        del description["identity"][name]
    description["identity"]["max_grad_norm"] = None
    file.write_text(json.dumps(description | {"sha256": _digest(description)}))
    assert resume(checkpointer("--rtd_lambda", "50", "--num_training_steps", "9")).step == 10
    assert "then" not in log.text
    assert "changed" not in log.text


def test_the_settings_of_each_part_of_a_run_are_kept(run_of, tmp_path):
    (tmp_path / "run").mkdir()
    for step, *flags in ((0,), (0, "--seed", "5"), (0, "--seed", "6"), (0, "--seed", "6"), (20,)):
        build._write_config(run_of(*flags), step)
    seeds = {
        file.name: json.loads(file.read_text())["seed"]
        for file in (tmp_path / "run").glob("config*")
    }
    assert seeds == {
        "config.step_0000000.json": 1234,
        "config.step_0000000_2.json": 5,
        "config.step_0000020.json": 6,
        "config.json": 1234,
    }
