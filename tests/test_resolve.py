"""What a run leaves to its data is filled in once, at the start."""

import pytest

from ds_deberta.build import describe_length
from ds_deberta.config import PretrainConfig, parse
from ds_deberta.plan import plan
from ds_deberta.resolve import describe_padding, describe_schedule, resolve, warnings_of


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


@pytest.mark.parametrize(
    ("steps", "warmup", "warms_up"), [(1, 1, 1), (10, 9, 9), (10, 0.06, 1), (2300, 0.06, 138)]
)
def test_a_warm_up_is_shorter_than_the_run(short_data_dir, steps, warmup, warms_up):
    flags = ("--num_training_steps", str(steps), "--warmup", str(warmup))
    assert describe_schedule(run_of(short_data_dir, *flags)).endswith(
        f"steps, {warms_up} of them warm-up"
    )


@pytest.mark.parametrize(("steps", "warmup"), [(5000, 10_000), (10, 10), (10, 0.99)])
def test_a_warm_up_as_long_as_the_run_is_refused(short_data_dir, steps, warmup):
    flags = ("--num_training_steps", str(steps), "--warmup", str(warmup))
    run = run_of(short_data_dir, *flags)
    message = f"--warmup must be shorter than the run, {steps:,} steps .* Try --warmup 0.06"
    with pytest.raises(ValueError, match=message):
        describe_schedule(run)
    with pytest.raises(ValueError, match=message):
        list(plan(resolve(run), "gpu", None))


def test_a_preset_of_the_other_objective_is_said_to_lose_its_recipe(short_data_dir):
    flags = ["--objective", "mlm", "--data_dir", str(short_data_dir), "--output_dir", "x"]
    (said,) = warnings_of(resolve(parse([*flags, "--model", "deberta-v3-base"])))
    assert "deberta-v3-base is a preset of --objective rtd" in said
    assert not list(warnings_of(resolve(parse([*flags, "--model", "deberta-base"]))))


def test_epochs_are_turned_into_steps(short_data_dir, tmp_path):
    """200 rows, by batches of 64; and what is saved says the steps."""
    run = resolve(run_of(short_data_dir, "--epochs", "3"))
    assert (run.train.num_training_steps, run.train.epochs) == (10, None)
    assert "10 steps, 3.20 epochs over 200 rows" in describe_length(run)
    saved = tmp_path / "config.json"
    saved.write_text(run.to_json())
    again = parse(["--config", str(saved), "--train_batch_size", "32"])
    assert resolve(again).train.num_training_steps == 10
    other = resolve(parse(["--config", str(saved), "--epochs", "0.5"]))
    assert other.train.num_training_steps == 2
    (tmp_path / "wish.json").write_text('{"epochs": 2}')
    wish = run_of(short_data_dir, "--config", str(tmp_path / "wish.json"))
    assert resolve(wish).train.num_training_steps == 7
    steps = run_of(
        short_data_dir, "--config", str(tmp_path / "wish.json"), "--num_training_steps", "5"
    )
    assert resolve(steps).train.num_training_steps == 5


def test_two_lengths_are_refused(short_data_dir, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_of(short_data_dir, "--epochs", "3", "--num_training_steps", "5")
    assert "--epochs does not go with --num_training_steps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_of(short_data_dir, "--epochs", "0")
    assert "epochs must be positive" in capsys.readouterr().err


def test_a_plan_of_epochs_needs_the_data(tmp_path):
    with pytest.raises(ValueError, match="--epochs counts the rows of the data"):
        resolve(run_of(tmp_path / "none", "--epochs", "3"), needs_data=False)


def test_a_plan_says_what_the_minutes_allow(short_data_dir):
    """Steps of 64 x 24 tokens."""
    run = resolve(run_of(short_data_dir, "--max_minutes", "2"))
    assert "or 2 minutes, if these end first" in describe_length(run)
    text = "\n".join(plan(run, "gpu", 15_360))
    assert "ends after 2 minutes (--max_minutes): 1,200 steps" in text
