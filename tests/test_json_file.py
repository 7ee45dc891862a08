"""JSON that people write is read whole, or refused in one line."""

import json
from pathlib import Path

import pytest

from ds_deberta.config import parse
from ds_deberta.engine import DeepSpeedFacts, load_ds_config
from ds_deberta.json_file import MOST_LEVELS, read_object
from ds_deberta.model import MODELS, load_model_config
from ds_deberta.optim import OptimConfig
from ds_deberta.weights import _read_config

FLAGS = ["--objective", "rtd", "--model", "deberta-v3-base", "--output_dir", "x"]
FACTS = DeepSpeedFacts(
    train_batch_size=8, micro_batch_size=8, hidden_size=32, lr=1e-4, optim=OptimConfig()
)


def nested(levels: int) -> str:
    """As many lists in each other, in an object."""
    return "[" * (levels - 1) + "]" * (levels - 1)


def test_a_file_is_read_as_deep_as_settings_are(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(f'{{"a": {nested(MOST_LEVELS)}}}')
    read_object(file)
    for levels in (MOST_LEVELS + 1, 900, 100_000):
        file.write_text(f'{{"a": {nested(levels)}}}')
        with pytest.raises(ValueError, match="must have at most 50 levels"):
            read_object(file)


@pytest.mark.parametrize("levels", [60, 300, 900, 980, 100_000])
@pytest.mark.parametrize("key", ["hidden_size", "pos_att_type", "architectures", "unheard_of"])
def test_nothing_that_is_nested_deeply_ends_in_a_traceback(tmp_path, capsys, key, levels):
    file: Path = tmp_path / "config.json"
    known = json.dumps(MODELS["deberta-v3-base"].to_dict() | {key: 0})
    file.write_text(known.replace(f'"{key}": 0', f'"{key}": {nested(levels)}'))
    for read in (load_model_config, _read_config, lambda file: load_ds_config(file, FACTS)):
        with pytest.raises(ValueError, match="levels of brackets"):
            read(file)
    with pytest.raises(SystemExit, match="2"):
        parse([*FLAGS, "--config", str(file)])
    assert "levels of brackets" in capsys.readouterr().err


def test_a_key_that_stands_twice_is_named(tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text('{"zero_optimization": {"stage": 1}, "seed": 1, "zero_optimization": {}}')
    with pytest.raises(ValueError, match="has the key 'zero_optimization' twice"):
        load_ds_config(file, FACTS)
    file.write_text('{"bf16": {"enabled": true, "enabled": false}}')
    with pytest.raises(ValueError, match="has the key 'enabled' twice"):
        load_ds_config(file, FACTS)
    file.write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(SystemExit, match="2"):
        parse([*FLAGS, "--config", str(file)])
    assert "has the key 'seed' twice" in capsys.readouterr().err
