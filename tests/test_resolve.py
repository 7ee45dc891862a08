"""What a run leaves to its data is filled in once, at the start."""

import pytest

from ds_deberta.config import PretrainConfig, parse
from ds_deberta.plan import plan
from ds_deberta.resolve import describe_padding, resolve


def run_of(data_dir, *more: str, model: str = "deberta-v3-nano") -> PretrainConfig:
    flags = ["--objective", "rtd", "--model", model, "--data_dir", str(data_dir)]
    return parse([*flags, "--output_dir", "x", *more])


@pytest.mark.parametrize("model", ["deberta-v3-nano", "deberta-v3-base"])
def test_rows_are_as_long_as_the_data_s_in_every_preset(short_data_dir, model):
    run = resolve(run_of(short_data_dir, model=model))
    assert run.data.max_seq_length == run.data.row_length == 24
    assert describe_padding(run) == ""


def test_the_flag_wins_and_padding_is_said(short_data_dir):
    run = resolve(run_of(short_data_dir, "--max_seq_length", "96"))
    assert run.data.row_length == 96
    assert "rows of 24 are padded to 96: 4 times the work" in describe_padding(run)
    assert "\nWarning: rows of 24 are padded to 96" in "\n".join(plan(run, "gpu", None))


def test_a_saved_configuration_keeps_its_length(short_data_dir, tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(resolve(run_of(short_data_dir, "--max_seq_length", "64")).to_json())
    assert resolve(parse(["--config", str(saved)])).data.row_length == 64


@pytest.mark.parametrize(("model", "length"), [("deberta-v3-nano", 32), ("deberta-v3-base", 512)])
def test_only_a_plan_goes_without_data(tmp_path, model, length):
    run = run_of(tmp_path / "none", model=model)
    assert resolve(run, needs_data=False).data.row_length == length
    with pytest.raises(FileNotFoundError, match="must be a folder of prepared data"):
        resolve(run)
