import json
from dataclasses import replace
from pathlib import Path

import pytest

from ds_deberta.config import parse
from ds_deberta.optim import warmup_steps
from ds_deberta.recipes import RECIPES
from tests.launch import ROOT

MLM = ["--objective", "mlm", "--model", "bert-base", "--output_dir", "runs/x"]
RTD = ["--objective", "rtd", "--model", "deberta-v3-base", "--output_dir", "runs/x"]


def test_the_recipe_fills_in_and_the_command_line_wins():
    run = parse(RTD)
    assert (run.optim.learning_rate, run.train.train_batch_size) == (1e-4, 256)
    run = parse([*RTD, "--learning_rate", "2e-4", "--train_batch_size", "32"])
    assert (run.optim.learning_rate, run.train.train_batch_size) == (2e-4, 32)
    assert run.train.num_training_steps == 1_000_000


@pytest.mark.parametrize(
    ("objective", "preset"), [("mlm", "deberta-nano"), ("rtd", "deberta-v3-nano")]
)
def test_a_shorter_run_of_a_nano_preset_warms_up_as_long(objective, preset):
    command = ["--objective", objective, "--model", preset, "--output_dir", "x"]
    for more in ([], ["--num_training_steps", "400"]):
        run = parse([*command, *more])
        assert warmup_steps(run.optim, run.train.num_training_steps) == 100


def test_the_saved_configuration_loads_again(tmp_path):
    run = parse([*RTD, "--warmup", "0.1", "--pos_att_type", "c2p", "--relative_attention", "true"])
    assert run.accept_changes == ()
    run = replace(run, accept_changes=("data", "seed"))
    assert parse([*RTD, "--accept_changes", "data", "seed"]).accept_changes == ("data", "seed")
    (tmp_path / "config.json").write_text(run.to_json())
    assert parse(["--config", str(tmp_path / "config.json")]) == run


def test_a_config_file_beats_the_recipe_and_the_command_line_beats_it(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"learning_rate": 5e-4, "seed": 3}))
    run = parse([*RTD, "--config", str(tmp_path / "c.json"), "--seed", "4"])
    assert (run.optim.learning_rate, run.seed) == (5e-4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "rtd"], "--model must be given"),
        ([*RTD, "--embedding_sharing", "half"], "must be one of gdes, es, nes; got 'half'"),
        ([*RTD, "--seed", "1.5"], "seed must be a whole number; got '1.5'"),
        ([*RTD, "--relative_attention", "maybe"], "must be true or false; got 'maybe'"),
        ([*RTD, "--max_ngram", "3"], "max_ngram must be 1 for RTD"),
        ([*RTD, "--init_model", "x"], "--init_model does not go with --objective rtd"),
        ([*MLM, "--rtd_lambda", "50"], "--rtd_lambda does not go with --objective mlm"),
        ([*RTD, "--objective", "both"], "objective must be one of rtd, mlm; got 'both'"),
        ([*RTD, "--learning_rate", "-1"], "learning_rate must be positive"),
        ([*RTD, "--temperature", "0"], "temperature must be positive"),
        ([*RTD, "--config", "nowhere.json"], "nowhere.json cannot be read"),
        ([*RTD, "--num_training_step", "3"], "unrecognized arguments"),
    ],
)
def test_mistakes_end_with_status_2_and_say_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_setting_in_a_config_file_is_refused(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"learning_rat": 1}))
    with pytest.raises(SystemExit):
        parse([*RTD, "--config", str(tmp_path / "c.json")])
    assert "unknown settings: learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--local_rank", "0"], ["--local-rank=0"]])
def test_what_launchers_add_is_understood(flag):
    assert parse([*RTD, *flag]) == parse(RTD)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    flags = list(json.loads(parse(RTD).to_json()))
    assert all(f"--{flag} " in text for flag in flags)
    assert "Peak learning rate" in text
    assert "(default: 0.0001)" in text


@pytest.mark.parametrize(
    ("objective", "preset"), [(o, p) for o, presets in RECIPES.items() for p in presets]
)
def test_every_recipe_runs_on_any_power_of_two_processes(objective, preset):
    """As far as it has rows: the demo too, on as many GPUs as there are."""
    run = parse(["--objective", objective, "--model", preset, "--output_dir", "runs/x"])
    rows = run.train.train_batch_size
    for processes in (1, 2, 4, 8, 16, 32):
        micro = run.train.micro_batch(processes)
        assert rows % (micro * processes) == 0
        assert micro == min(rows // processes, run.train.micro_batch_size or 32)


def test_a_micro_batch_is_at_most_what_a_process_has_and_must_divide_it():
    train = parse([*RTD, "--train_batch_size", "48", "--micro_batch_size", "32"]).train
    assert train.micro_batch(2) == 24
    with pytest.raises(ValueError, match=r"got 48 and 32 x 1\. Try --micro_batch_size 24\."):
        train.micro_batch(1)
    assert replace(train, micro_batch_size=None).micro_batch(1) == 24


@pytest.mark.parametrize(
    ("objective", "preset"), [(o, p) for o, presets in RECIPES.items() for p in presets]
)
def test_every_recipe_parses_and_names_a_shipped_config(objective, preset):
    run = parse(["--objective", objective, "--model", preset, "--output_dir", "runs/x"])
    assert (ROOT / run.deepspeed_config).is_file()
    assert run.output_dir == Path("runs/x")


def test_recipes_are_the_originals_where_it_had_one():
    def of(objective: str, preset: str) -> tuple:
        run = parse(["--objective", objective, "--model", preset, "--output_dir", "x"])
        train, optim = run.train, run.optim
        return (
            optim.learning_rate,
            train.train_batch_size,
            optim.warmup,
            train.num_training_steps,
            run.data.max_ngram,
        )

    assert of("mlm", "bert-base") == (1e-4, 256, 10_000, 1_000_000, 1)
    assert of("mlm", "deberta-base") == (1e-4, 256, 10_000, 1_000_000, 3)
    assert of("mlm", "xxlarge-v2") == (1e-4, 32, 1_000, 1_000_000, 3)
    assert of("rtd", "deberta-v3-xsmall") == (3e-4, 64, 10_000, 1_000_000, 1)
    assert of("rtd", "deberta-v3-large") == (1e-4, 256, 10_000, 1_000_000, 1)
    assert of("rtd", "deberta-v3-small-continue") == (5e-5, 256, 10_000, 100_000, 1)
