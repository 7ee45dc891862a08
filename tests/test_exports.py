"""Exports on the way are made of the checkpoints whose turn has come."""

from pathlib import Path

import pytest

from ds_deberta import exports
from ds_deberta.distributed import logger
from ds_deberta.exports import Exports
from ds_deberta.trainer import TrainConfig


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, str]]:
    made = []

    def update(checkpoint: Path, folder: Path) -> bool:
        made.append((checkpoint.name, "/".join(folder.parts[-2:])))
        return True

    monkeypatch.setattr(exports, "update_export", update)
    return made


def test_checkpoints_are_exported_when_their_turn_has_come(tmp_path, made):
    on_the_way = Exports(tmp_path, 20)
    for step in (None, 10, 20, 20, 30, 35, 40):
        on_the_way.update(step and tmp_path / f"checkpoints/step_{step:07d}")
    assert made == [(name, f"exports/{name}") for name in ("step_0000020", "step_0000040")]
    Exports(tmp_path, None).update(tmp_path / "checkpoints/step_0000020")
    assert len(made) == 2


def test_an_export_that_fails_is_announced_and_no_more(tmp_path, monkeypatch, caplog):
    def fail(*_: Path) -> bool:
        raise OSError("No space left on device")

    logger.propagate = True  # for caplog
    monkeypatch.setattr(exports, "update_export", fail)
    Exports(tmp_path, 20).update(tmp_path / "checkpoints/step_0000020")
    assert "step_0000020 could not be exported: No space left on device" in caplog.text


def test_exports_are_made_of_checkpoints():
    with pytest.raises(ValueError, match=r"multiple of dump_interval.*Try --export_interval 60"):
        TrainConfig(export_interval=50, dump_interval=20)
    assert TrainConfig(export_interval=60, dump_interval=20).export_interval == 60
