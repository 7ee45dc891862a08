from pathlib import Path

import pytest
import torch

from ds_deberta.checkpoint import Checkpointer, TrainState, read_description


class FileEngine:
    """Saves one number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "value").write_text(str(self.value))

    def load(self, folder: Path) -> None:
        self.value = int((folder / "value").read_text())


def checkpointer(tmp_path: Path, keep: int = 0, **identity) -> Checkpointer:
    vocab = tmp_path / "vocab"
    vocab.write_text("pieces")
    return Checkpointer(
        tmp_path / "run", keep=keep, identity=identity, contents={"models": {}}, vocab_file=vocab
    )


def test_nothing_to_resume_starts_at_zero(tmp_path):
    assert checkpointer(tmp_path).resume({}) == TrainState(0, 0)


def test_what_was_saved_comes_back_and_the_newest_wins(tmp_path):
    for step in (9, 100, 20):
        checkpointer(tmp_path, seed=1).save(TrainState(step, step * 8), {"g": FileEngine(step)})
    engine = FileEngine(0)
    state = checkpointer(tmp_path, seed=1).resume({"g": engine})
    assert (state, engine.value) == (TrainState(100, 800), 100)


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    torch.manual_seed(1)
    checkpointer(tmp_path).save(TrainState(1, 8), {})
    expected = torch.rand(3)
    torch.manual_seed(2)
    checkpointer(tmp_path).resume({})
    assert torch.equal(torch.rand(3), expected)


def test_other_settings_are_refused_by_name(tmp_path):
    checkpointer(tmp_path, seed=1, betas=(0.9, 0.99)).save(TrainState(1, 8), {})
    with pytest.raises(ValueError, match=r"other settings \(seed: 1 then, 2 now\)"):
        checkpointer(tmp_path, seed=2, betas=(0.9, 0.99)).resume({})


def test_only_the_newest_are_kept(tmp_path):
    saver = checkpointer(tmp_path, keep=2)
    for step in (10, 20, 30):
        saver.save(TrainState(step, step), {})
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "step_0000020",
        "step_0000030",
    ]


def test_a_save_that_died_is_neither_loaded_nor_in_the_way(tmp_path):
    class DyingEngine(FileEngine):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise KeyboardInterrupt

    saver = checkpointer(tmp_path)
    saver.save(TrainState(10, 80), {"g": FileEngine(10)})
    with pytest.raises(KeyboardInterrupt):
        saver.save(TrainState(20, 160), {"g": DyingEngine(20)})
    assert checkpointer(tmp_path).resume({"g": FileEngine(0)}).step == 10
    checkpointer(tmp_path).save(TrainState(20, 160), {"g": FileEngine(21)})
    engine = FileEngine(0)
    assert checkpointer(tmp_path).resume({"g": engine}).step == 20
    assert engine.value == 21


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint\.json"):
        read_description(tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99, this program reads 1"):
        read_description(tmp_path)
